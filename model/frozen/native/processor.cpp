// Tells which variants this processor and this operating system can run.
#include "kernels.h"
#include "native.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct Registers { unsigned a, b, c, d; };

Registers cpuid(unsigned leaf) {
    Registers r = {0, 0, 0, 0};
    __get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d);
    return r;
}

bool bit(unsigned word, int place) { return word >> place & 1; }

// Return whether the operating system saves the wanted registers when it switches threads, by the bits of XCR0: 1-2
// AVX, 5-7 AVX-512, 17-18 AMX.
bool system_saves(unsigned wanted) {
    if (!bit(cpuid(1).c, 27)) return false;  // OSXSAVE
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & wanted) == wanted;
}

bool may_use_tiles() {
#if defined(__linux__)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // needed once in a process, before its first tile
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

}  // namespace

PUBLIC int32_t allattn_can_run(int32_t variant) {
    Registers one = cpuid(1), seven = cpuid(7);
    switch (variant) {
        case GENERIC: return 1;
        case AVX2: return system_saves(0x6) && bit(one.c, 12) && bit(seven.b, 5);  // FMA, AVX2
        case AVX512:  // F, DQ, BW, VL
            return allattn_can_run(AVX2) && system_saves(0xe6) && bit(seven.b, 16) && bit(seven.b, 17) &&
                   bit(seven.b, 30) && bit(seven.b, 31);
        case VNNI: return allattn_can_run(AVX512) && bit(seven.c, 11);
        case AMX:  // BF16, TILE, INT8
            return allattn_can_run(VNNI) && system_saves(0x600e6) && bit(seven.d, 22) && bit(seven.d, 24) &&
                   bit(seven.d, 25) && may_use_tiles();
        default: return 0;
    }
}

#else

PUBLIC int32_t allattn_can_run(int32_t variant) { return variant == GENERIC; }

#endif
