"""The native step: a frozen model on a CPU, one call into C++ for each step; native.h is the interface."""
