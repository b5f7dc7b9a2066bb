// Hits and misses of a policy over a trace: tierlm/tracing/replay.py and residency.py without predictions.

#include <algorithm>
#include <cstring>
#include <vector>

#include "frequency.h"
#include "queue.h"
#include "queues.h"
#include "recency.h"
#include "tier_info.h"

namespace {

template <class Policy>
class Residency {
    Policy policy;
    int slots, streaming_limit, resident_count = 0, streaming_count = 0;
    uint32_t layer_run = 1;  // a record with this number is pinned
    std::vector<uint32_t> pinned;
    std::vector<char> resident, streaming;
    Queue leaving;

public:
    explicit Residency(const TierInfo& info)
        : policy(info), slots(info.slots), streaming_limit(std::max(2, info.slots / 8)),
          pinned(info.records()), resident(info.records()), streaming(info.records()),
          leaving(info.records()) {}

    bool demand(int id, bool prefill) {
        if (!resident[id]) return false;
        if (!prefill) end_streaming(id);
        leaving.discard(id);
        policy.hit(id);
        pinned[id] = layer_run;
        return true;
    }

    bool start(int id, bool prefill) {
        bool displacing = false;
        if (resident_count >= slots) {
            int victim = find_victim(id, prefill);
            if (victim == NONE) return false;
            displacing = true;
            resident[victim] = 0;
            --resident_count;
            leaving.discard(victim);
            end_streaming(victim);
            policy.evict(victim);
        }
        resident[id] = 1;
        ++resident_count;
        if (prefill && displacing) {
            streaming[id] = 1;
            ++streaming_count;
        }
        policy.insert(id);
        pinned[id] = layer_run;
        return true;
    }

    void release(int id) {
        pinned[id] = 0;
        if (streaming[id]) leaving.push(id);
    }

    void release_all() { ++layer_run; }

private:
    int find_victim(int id, bool prefill) {
        auto free = [&](int candidate) { return pinned[candidate] != layer_run; };
        int found = leaving.find(free);
        if (found != NONE || (prefill && streaming_count >= streaming_limit)) return found;
        return policy.victim(id, free);
    }

    void end_streaming(int id) {
        streaming_count -= streaming[id];
        streaming[id] = 0;
    }
};

// Start all of missing and release everything, as _bring in replay.py.
template <class Policy>
bool bring(Residency<Policy>& residency, std::vector<int>& leased, const std::vector<int>& missing, bool prefill,
           int32_t*& behind) {
    size_t batch = std::max<size_t>(leased.size(), 1), wanted = leased.size() + missing.size();
    size_t started = 0;
    for (size_t released = 0; released < wanted;) {
        for (; started < missing.size() && residency.start(missing[started], prefill); ++started) {
            leased.push_back(missing[started]);
            if (prefill) *behind++ = int32_t(released);
        }
        if (released == leased.size()) return false;
        size_t count = prefill || released ? 1 : batch;
        for (; count > 0; --count) residency.release(leased[released++]);
    }
    return true;
}

template <class Policy>
bool replay(const TierInfo& info, const uint8_t* prefills, const int32_t* places, int32_t* missed,
            int32_t* behind) {
    Residency<Policy> residency(info);
    std::vector<int> leased, missing;
    int64_t at = 0;
    for (int64_t group = 0; group < info.groups; ++group) {
        bool prefill = prefills[group / info.layers];
        int64_t begin = at, end = info.ends[group];
        leased.clear();
        missing.clear();
        for (; at < end; ++at) (residency.demand(info.ids[at], prefill) ? leased : missing).push_back(info.ids[at]);
        missed[group] = int32_t(missing.size());
        if (prefill && places)
            std::sort(missing.begin(), missing.end(), [&](int a, int b) { return places[a] < places[b]; });
        if (prefill || end - begin > info.slots) {
            if (!bring(residency, leased, missing, prefill, behind)) return false;
            continue;
        }
        for (int id : missing) residency.start(id, false);
        residency.release_all();
    }
    return true;
}

struct Entry {
    const char* name;
    bool (*run)(const TierInfo&, const uint8_t*, const int32_t*, int32_t*, int32_t*);
};

const Entry POLICIES[] = {
    {"fifo", replay<Fifo>}, {"lru", replay<Lru>},     {"layer-lru", replay<LayerLru>},   {"clock", replay<Clock>},
    {"2q", replay<TwoQ>},   {"sieve", replay<Sieve>}, {"s3-fifo", replay<S3Fifo>},       {"arc", replay<Arc>},
    {"lfu", replay<Lfu>},   {"lru-k", replay<LruK>},  {"lfu-ageing", replay<LfuAgeing>}, {"belady", replay<Belady>},
};

}  // namespace

// prefills: [steps]; places: [records] place on the disk within the layer, null: by number. Writes missed [groups], and
// behind: for each record that a prefill missed, in starting order, how many of its layer had been released before.
// Returns 0: done; 1: unknown policy; 2: no slot available.
extern "C" int tierlm_replay(const char* policy, const double* parameters, const int32_t* ids, const int64_t* ends,
                             int64_t groups, const uint8_t* prefills, const int32_t* places, int layers, int experts,
                             int slots, int32_t* missed, int32_t* behind) {
    TierInfo info{layers, experts, slots, parameters, ids, ends, groups};
    for (const Entry& entry : POLICIES)
        if (!std::strcmp(entry.name, policy)) return entry.run(info, prefills, places, missed, behind) ? 0 : 2;
    return 1;
}
