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

// For words that are themselves the signal: each of the four is seen whole, in no order among them.
__device__ __forceinline__ uint4 load_relaxed_vector(const void* address) {
  uint4 value;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ void store_relaxed_vector(void* address, const uint4& value) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

__device__ __forceinline__ uint64_t load_acquire_system(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint64_t load_relaxed_system(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_release_system(uint64_t* address, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ void store_relaxed_system(uint64_t* address, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// The step's tables. They may be read before `wait_for_predecessor`, so never through L1.
__device__ __forceinline__ int32_t load_table(const int32_t* address) {
  int32_t value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address));
  return value;
}

__device__ __forceinline__ int4 load_table_vector(const int32_t* address) {
  int4 value;
  asm volatile("ld.relaxed.gpu.global.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

__device__ __forceinline__ uint64_t global_timer_ns() {
  uint64_t value;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value)::"memory");
  return value;
}

__device__ __forceinline__ uint32_t load_silent_mask(const InstanceState* state) {
  return *reinterpret_cast<const volatile uint32_t*>(&state->silent_mask);
}

__device__ __forceinline__ uint64_t load_epoch(const uint64_t* epoch) { return *reinterpret_cast<const volatile uint64_t*>(epoch); }

// Repeats `arrived` until it says so. Returns false when instance `source` is silent: it stayed so for `limit_ns` (then it is marked,
// and later waits give up at once) or was marked before.
template <typename Arrived>
__device__ __forceinline__ bool wait_until(Arrived arrived, uint64_t epoch, int source, InstanceState* state, uint64_t limit_ns) {
  if (arrived()) return true;
  const uint64_t start = global_timer_ns();
  while (true) {
    for (int poll = 0; poll < 32; ++poll) {
      if (arrived()) return true;
    }
    if (load_silent_mask(state) >> source & 1u) return false;
    if (global_timer_ns() - start > limit_ns) {
      const uint32_t before = atomicOr(&state->silent_mask, 1u << source);
      if (!(before >> source & 1u)) state->silent_epoch[source] = epoch;
      return false;
    }
  }
}

// Waits until `flag` announces exchange `epoch` of instance `source`. The acquire orders what the caller, and threads it meets at a
// barrier, read afterwards.
__device__ __forceinline__ bool wait_for_flag(const uint64_t* flag, uint64_t epoch, int source, InstanceState* state, uint64_t limit_ns) {
  return wait_until([=] { return load_acquire_system(flag) >= epoch; }, epoch, source, state, limit_ns);
}

// Programmatic dependent launch: a kernel may be on the device before its predecessor ends. Nothing may be read or written that an
// earlier kernel could still touch before `wait_for_predecessor`; without such a launch both are no-ops. The step's tables are an
// exception: the table kernel is no such launch and speaks up for no successor, so whatever follows it in the stream starts after its
// last block, which ends with a fence.
__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_successor_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Has the value computed here, not later where it is used.
template <typename Pointer>
__device__ __forceinline__ void compute_now(Pointer*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// Base address of every instance's exchange buffer as this process sees it.
struct PeerPointers {
  uint8_t* base[kMaxInstances];
};

__device__ __forceinline__ int target_instance(int32_t target) { return target >> kTargetSlotBits; }
__device__ __forceinline__ int target_slot(int32_t target) { return target & kTargetSlotMask; }

// Instances of one process on one GPU may share a launch.
template <typename Params, int kMaxMembers>
struct Group {
  Params members[kMaxMembers];
  int32_t size;
};

// Work items of all members of a group, one member's after another's, which warps take in turns.
template <int kMaxMembers>
class WorkList {
 public:
  // `count`: in lane k the number of member k's items, 0 in lanes beyond. Whole warps.
  __device__ __forceinline__ explicit WorkList(int count) : end_(count) {
    if (kMaxMembers == 1) end_ = __shfl_sync(0xffffffffu, count, 0);
#pragma unroll
    for (int step = 1; step < kMaxMembers; step *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, end_, step);
      if ((threadIdx.x & 31) >= step) end_ += before;
    }
    size_ = kMaxMembers == 1 ? end_ : __shfl_sync(0xffffffffu, end_, kMaxMembers - 1);
  }

  __device__ __forceinline__ int size() const { return size_; }

  // `item` is turned into an index within the returned member.
  __device__ __forceinline__ int member_of(int& item) const {
    if constexpr (kMaxMembers == 1) return 0;
    const int member = __popc(__ballot_sync(0xffffffffu, (threadIdx.x & 31) < kMaxMembers && end_ <= item));
    const int begin = __shfl_sync(0xffffffffu, end_, member == 0 ? 0 : member - 1);
    if (member > 0) item -= begin;
    return member;
  }

 private:
  int end_;  // of the items of the member that is this lane's
  int size_;
};

}  // namespace dcp
