"""The native step: a frozen model on a CPU as one call a step, in C++; native.h is its interface."""
