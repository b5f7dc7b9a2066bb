// The input of a replay. Each policy has the name, parameters and decisions of the class in tierlm/policies of the same
// name; tests/test_compiled.py compares them request by request.
//
// insert, hit, evict: as on_insert, on_hit, on_evict. victim(incoming, free): the first of victims() that is free, or
// NONE. A record is the number layer x experts + expert, ordered as its key.
#pragma once

#include <cstdint>

struct TierInfo {
    int layers, experts, slots;
    const double* parameters;  // of the policy
    const int32_t* ids;        // all demands, by step and layer
    const int64_t* ends;       // [groups] the end of each layer of each step in ids
    int64_t groups;

    int records() const { return layers * experts; }
    int whole(int at) const { return int(parameters[at]); }
};
