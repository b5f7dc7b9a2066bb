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

// float16 to float32: shifts exponent and mantissa into place, then multiplies by 2 to the difference of the exponent
// biases. Exact for subnormal numbers too. Infinities and NaN become large numbers; weights have neither.
INLINE Floats from_half(const void* p) {
    const Words raw = __builtin_convertvector(*static_cast<const Halves*>(p), Words);
    const Words bits = ((raw & 0x8000u) << 16) | ((raw & 0x7fffu) << 13);
    return reinterpret_cast<Floats>(bits) * 0x1p112f;
}
