// Compiler vector types. CLONES compiles a function once per instruction set; the best is chosen when the library is
// loaded. TIERLM_PORTABLE builds only portable code, for tests.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(TIERLM_PORTABLE)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

constexpr int LANES = 8;

typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef Words LooseWords __attribute__((aligned(1), may_alias));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(1), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

// float16 to float32: moves exponent and mantissa into place and corrects the exponent; where it is zero, a subtraction
// does so. Never computes with subnormal numbers, which processors take a hundred times as long for. Infinities and NaN
// become large numbers; weights have neither.
INLINE Floats from_half(const void* p) {
    const Words raw = __builtin_convertvector(*static_cast<const Halves*>(p), Words);
    const Words size = (raw & 0x7fffu) << 13;
    const Floats normal = reinterpret_cast<Floats>(size + 0x38000000u);
    const Floats small = reinterpret_cast<Floats>(size | 0x38800000u) - 0x1p-14f;
    const Floats value = size < 0x800000u ? small : normal;
    return reinterpret_cast<Floats>(reinterpret_cast<Words>(value) | (raw & 0x8000u) << 16);
}
