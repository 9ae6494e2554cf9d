"""The native step: a frozen model on a CPU as one call a step, in C++. See native.h for the interface, step.cpp for the flow."""
