"""A pretended CUDA device: tensors that say "cuda:0" and keep their numbers on the CPU.

What it finds: operations that mix the two devices, and each place where the host waits for the device. What it cannot see:
which kernel runs, memory, speed, NCCL, CUDA's own random numbers.
"""
