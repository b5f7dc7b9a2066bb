// What a replay is about. Each policy below has the name, the parameters and the decisions of the class in
// tierlm/policies that is called so; tests/test_compiled.py holds them together, request for request.
//
// insert, hit, evict: as on_insert, on_hit, on_evict. victim(incoming, free): the first of victims() that is free, or
// NONE. A record is a number, layer x experts + expert, so that numbers are ordered as keys are.
#pragma once

#include <cstdint>

struct TierInfo {
    int layers, experts, slots;
    const double* parameters;  // of the policy
    const int32_t* ids;        // all that is demanded, layer by layer of each step
    const int64_t* ends;       // [groups] behind the last of each layer of each step
    int64_t groups;

    int records() const { return layers * experts; }
    int whole(int at) const { return int(parameters[at]); }
};
