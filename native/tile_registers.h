// Whether programs may use the tile registers of Intel's AMX. cpuid says only that the CPU has them.
//
// The operating system must save them when it switches between threads, and says so in the register XCR0. Linux gives
// them only to processes that ask (https://docs.kernel.org/arch/x86/xstate.html). A virtual machine may have AMX in
// cpuid and lack either: the first instruction of AMX then ends the process.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif

namespace trio {

// The parts of a thread's registers that the operating system saves, a bit for each.
inline uint64_t saved_registers() {
    constexpr uint32_t OSXSAVE = uint32_t(1) << 27; // in ecx of leaf 1: whether XCR0 can be read
#if defined(_MSC_VER)
    int leaf[4];
    __cpuid(leaf, 1);
    return (uint32_t(leaf[2]) & OSXSAVE) == 0 ? 0 : _xgetbv(0);
#else
    uint32_t a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & OSXSAVE) == 0) return 0;
    __asm__ __volatile__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return uint64_t(d) << 32 | a;
#endif
}

// Asks for the tile registers, on Linux for the whole process. Returns whether it may use them.
inline bool may_use_tiles() {
    constexpr uint64_t TILE_CONFIGURATION = uint64_t(1) << 17, TILE_DATA = uint64_t(1) << 18;
    constexpr uint64_t both = TILE_CONFIGURATION | TILE_DATA;
    if ((saved_registers() & both) != both) return false;
#if defined(__linux__)
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return true;
#endif
}

} // namespace trio
