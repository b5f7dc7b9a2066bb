// Activations as int8: groups of 32 share a scale, the largest of a group becomes 127 or -127, halves go to the even
// number. What is no number makes its group's scale none, so that it reaches the outputs.

// A product is rounded before anything is added to it, so that every processor, and torch, finds the same numbers.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <algorithm>
#include <cstring>

#include "product.h"

namespace {

constexpr float NEGLIGIBLE = 1e-30f;  // a group with nothing larger is taken for zeros
constexpr float WHOLE = 0x1.8p23f;    // added and subtracted: the nearest whole number, for less than 2^22

INLINE void round_group(const float* x, int64_t count, Rounded* to) {
    constexpr int VECTORS = GROUP / LANES;
    Floats values[VECTORS] = {};
    std::memcpy(values, x, count * sizeof(float));
    Floats largest = {}, nothing = {};
    for (int v = 0; v < VECTORS; ++v) {
        const Floats size = values[v] < 0.0f ? -values[v] : values[v];
        largest = size > largest ? size : largest;
        nothing += values[v] * 0.0f;
    }
    float most = 0, poison = 0;
    for (int i = 0; i < LANES; ++i) {
        most = std::max(most, largest[i]);
        poison += nothing[i];
    }
    const float inverse = most > NEGLIGIBLE && poison == 0 ? 127.0f / most : 0.0f;
    to->scale = most / 127.0f + poison;
    Ints sum = {};
    for (int v = 0; v < VECTORS; ++v) {
        const Floats whole = (values[v] * inverse + WHOLE) - WHOLE;
        const Ints number = poison == 0 ? __builtin_convertvector(whole, Ints) : Ints{};
        sum += number;
        for (int i = 0; i < LANES; ++i) to->numbers[v * LANES + i] = static_cast<int8_t>(number[i]);
    }
    to->sum = 0;
    for (int i = 0; i < LANES; ++i) to->sum += sum[i];
}

}  // namespace

CLONES void round_activations(const float* x, Rounded* rounded, int64_t rows, int64_t ins, int64_t first,
                              int64_t last) {
    const int64_t groups = groups_of(ins);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = first; i < last; i += GROUP)
            round_group(x + row * ins + i, std::min(GROUP, last - i), rounded + row * groups + i / GROUP);
}
