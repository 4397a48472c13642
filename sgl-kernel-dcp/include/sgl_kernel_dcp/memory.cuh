// Loads, stores and bounded waits that cross GPUs.
#pragma once

#include <cstdint>

#include "layout.cuh"

namespace dcp {

// Coherent load that leaves no line in L1: rows are read once.
__device__ __forceinline__ uint4 load_vector(const void* address) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

__device__ __forceinline__ void store_vector(void* address, const uint4& value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ uint64_t load_acquire_system(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_release_system(uint64_t* address, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ void store_relaxed_system(uint64_t* address, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ uint64_t global_timer_ns() {
  uint64_t value;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value)::"memory");
  return value;
}

__device__ __forceinline__ uint32_t load_silent_mask(const InstanceState* state) {
  return *reinterpret_cast<const volatile uint32_t*>(&state->silent_mask);
}

// Waits until `flag` announces exchange `epoch` of instance `source`. Returns false when `source` is silent: it stayed so for
// `limit_ns` (then it is marked, and later waits give up at once) or was marked before. The acquire orders what the caller, and
// threads it meets at a barrier, read afterwards.
__device__ __forceinline__ bool wait_for_flag(const uint64_t* flag, uint64_t epoch, int source, InstanceState* state, uint64_t limit_ns) {
  if (load_acquire_system(flag) >= epoch) return true;
  const uint64_t start = global_timer_ns();
  while (true) {
    for (int poll = 0; poll < 32; ++poll) {
      if (load_acquire_system(flag) >= epoch) return true;
    }
    if (load_silent_mask(state) >> source & 1u) return false;
    if (global_timer_ns() - start > limit_ns) {
      const uint32_t before = atomicOr(&state->silent_mask, 1u << source);
      if (!(before >> source & 1u)) state->silent_epoch[source] = epoch;
      return false;
    }
  }
}

// Programmatic dependent launch: a kernel may be on the device before its predecessor ends. Nothing may be read or written that an
// earlier kernel could still touch before `wait_for_predecessor`; without such a launch both are no-ops.
__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_successor_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Base address of every instance's exchange buffer as this process sees it.
struct PeerPointers {
  uint8_t* base[kMaxInstances];
};

__device__ __forceinline__ int target_instance(int32_t target) { return target >> kTargetSlotBits; }
__device__ __forceinline__ int target_slot(int32_t target) { return target & kTargetSlotMask; }

}  // namespace dcp
