// Vectors of the compiler's own kind, compiled once per instruction set: the best one is chosen when the library is
// loaded. TIERLM_PORTABLE leaves what runs on any processor, to test it.
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

// float16 to float32. Exponent and mantissa are moved into place and the difference of the exponents' biases multiplied
// in, which is right for subnormal numbers as well. Infinities and NaN become large numbers: a weight is neither.
INLINE Floats from_half(const void* p) {
    const Words raw = __builtin_convertvector(*static_cast<const Halves*>(p), Words);
    const Words bits = ((raw & 0x8000u) << 16) | ((raw & 0x7fffu) << 13);
    return reinterpret_cast<Floats>(bits) * 0x1p112f;
}
