// e^x on compiler vectors.
#pragma once

#include "vectors.h"

// e^x = 2^n e^r, |r| <= ln(2) / 2, with a polynomial for e^r (Cephes, expf.c). The error is at most 2 ulp. x is clamped
// to what float32 can hold.
INLINE Floats exponential(Floats x) {
    const Floats low = Floats{} - 87.0f, high = Floats{} + 88.0f;
    x = x < low ? low : x > high ? high : x;
    const Ints n = __builtin_convertvector(x * 1.44269504f + (x < 0.0f ? Floats{} - 0.5f : Floats{} + 0.5f), Ints);
    const Floats whole = __builtin_convertvector(n, Floats);
    const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * reinterpret_cast<Floats>((n + 127) << 23);
}
