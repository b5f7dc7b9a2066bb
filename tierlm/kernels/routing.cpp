// Routing: expert ids and router weights of each token, (token, choice) pairs sorted by expert, and the weighted sum.

#include <cmath>
#include <limits>

#include "../layout.h"
#include "activations.h"
#include "team.h"

namespace {

struct Router {
    Matrix gate, bias, norm;  // vectors bias and norm are zeros if absent; without norm, x is normed already
    int64_t softmax, groups, groups_chosen, normalize, chosen;
    const float* x;  // [rows, hidden]
    int64_t rows;
    float* weights;    // [rows, chosen], best first
    int64_t* experts;  // [rows, chosen]
};

constexpr float NEVER = -std::numeric_limits<float>::infinity(), TAKEN = std::numeric_limits<float>::quiet_NaN();

// The index of the first largest value; NaN is smaller than all others.
int64_t largest(const float* x, int64_t count) {
    int64_t best = 0;
    for (int64_t i = 1; i < count; ++i)
        if (x[i] > x[best] || (x[best] != x[best] && x[i] == x[i])) best = i;
    return best;
}

// The score of a group: its best expert's (DeepSeek-V2), or the sum of its two best (DeepSeek-V3).
float worth(const float* choice, int64_t size, bool softmax) {
    const int64_t best = largest(choice, size);
    if (softmax) return choice[best];
    float second = NEVER;
    for (int64_t i = 0; i < size; ++i)
        if (i != best) second = std::max(second, choice[i]);
    return choice[best] + second;
}

// Sets `choice` to NEVER in all but the best groups.
void close_groups(const Router& r, float* choice, float* worths) {
    const int64_t size = r.gate.outs / r.groups;
    for (int64_t g = 0; g < r.groups; ++g) worths[g] = worth(choice + g * size, size, r.softmax);
    for (int64_t kept = 0; kept < r.groups_chosen; ++kept) worths[largest(worths, r.groups)] = TAKEN;
    for (int64_t g = 0; g < r.groups; ++g)
        if (worths[g] == worths[g]) std::fill(choice + g * size, choice + (g + 1) * size, NEVER);
}

void route(const Router& r, float eps, float scale) {
    const int64_t hidden = r.gate.ins, experts = r.gate.outs;
    const auto norm = floats_of(r.norm), bias = floats_of(r.bias), x = room<float>(hidden);
    const auto scores = room<float>(experts), choice = room<float>(experts), worths = room<float>(r.groups);
    const auto rounded = room<Rounded>(groups_of(hidden));
    for (int64_t row = 0; row < r.rows; ++row) {
        const float* input = r.x + row * hidden;
        if (norm) {
            normalised(input, norm.get(), x.get(), hidden, eps);
            input = x.get();
        }
        if (r.gate.as().rounds) round_activations(input, rounded.get(), 1, hidden, 0, hidden);
        r.gate.as().outputs(r.gate.times(input, rounded.get(), scores.get(), 1), 0, experts);
        if (r.softmax) {
            softmax(scores.get(), experts, 1);
        } else {
            for (int64_t i = 0; i < experts; ++i) scores[i] = 1 / (1 + std::exp(-scores[i]));
        }
        for (int64_t i = 0; i < experts; ++i) {
            choice[i] = scores[i] + (bias ? bias[i] : 0);
            if (choice[i] != choice[i]) choice[i] = NEVER;  // only TAKEN is NaN, so that no expert is chosen twice
        }
        if (r.groups > 1) close_groups(r, choice.get(), worths.get());
        float sum = 0;
        for (int64_t k = 0; k < r.chosen; ++k) {
            const int64_t best = largest(choice.get(), experts);
            r.experts[row * r.chosen + k] = best;
            sum += r.weights[row * r.chosen + k] = scores[best];
            choice[best] = TAKEN;
        }
        for (int64_t k = 0; k < r.chosen; ++k) {
            float& weight = r.weights[row * r.chosen + k];
            weight = (r.normalize ? weight / (sum + 1e-20f) : weight) * scale;
        }
    }
}

}  // namespace

LAYOUT(Router, FIELD(gate), FIELD(bias), FIELD(norm), FIELD(softmax), FIELD(groups), FIELD(groups_chosen),
       FIELD(normalize), FIELD(chosen), FIELD(x), FIELD(rows), FIELD(weights), FIELD(experts))

// Single-threaded: a router is small, and waking threads takes longer.
extern "C" void tierlm_route(const Router* routers, int64_t count, double eps, double scale) {
    for (int64_t i = 0; i < count; ++i) route(routers[i], static_cast<float>(eps), static_cast<float>(scale));
}

// A stable counting sort of (token, choice) pairs by expert. All ids are below `count`. `order`: the pair in each row;
// `inverse`: the row of each pair. `heads` [2, min(pairs, count)]: the distinct ids and their counts. Returns how many
// ids are distinct.
extern "C" int64_t tierlm_grouped(const int64_t* experts, int64_t* order, int64_t* inverse, int64_t pairs,
                                  int64_t count, int64_t* heads) {
    const auto rows = room<int64_t>(count);  // per expert: number of pairs, then row of its next pair
    std::fill(rows.get(), rows.get() + count, 0);
    for (int64_t pair = 0; pair < pairs; ++pair) ++rows[experts[pair]];
    int64_t found = 0, row = 0, *counts = heads + std::min(pairs, count);
    for (int64_t expert = 0; expert < count; ++expert) {
        if (!rows[expert]) continue;
        heads[found] = expert;
        counts[found] = rows[expert];
        rows[expert] = row;
        row += counts[found++];
    }
    for (int64_t pair = 0; pair < pairs; ++pair) {
        inverse[pair] = rows[experts[pair]]++;
        order[inverse[pair]] = pair;
    }
    return found;
}

// total = (shared + sum over k of weights[row, k] * outputs[inverse[row, k]]) + hidden, summed in that order; a null
// `shared` is zeros.
extern "C" void tierlm_combine(const float* hidden, const float* shared, const float* weights, const float* outputs,
                               const int64_t* inverse, float* total, int64_t rows, int64_t width, int64_t chosen) {
    for (int64_t row = 0; row < rows; ++row) {
        float* sum = total + row * width;
        if (shared) {
            std::copy(shared + row * width, shared + (row + 1) * width, sum);
        } else {
            std::fill(sum, sum + width, 0.0f);
        }
        for (int64_t k = row * chosen; k < (row + 1) * chosen; ++k)
            for (int64_t i = 0; i < width; ++i) sum[i] += weights[k] * outputs[inverse[k] * width + i];
        for (int64_t i = 0; i < width; ++i) sum[i] += hidden[row * width + i];
    }
}
