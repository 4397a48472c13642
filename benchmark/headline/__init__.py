"""What dynamic context parallelism gains on real GPUs, against what people run: highest request rates under limits on TPOT."""
