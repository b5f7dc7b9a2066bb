// tierlm/policies/frequency.py, ranking.py and belady.py
#pragma once

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "queue.h"
#include "tier_info.h"

using Rank = std::pair<double, int64_t>;  // the second is unique among records
constexpr double NEVER = std::numeric_limits<double>::infinity();

// A heap of records, the smallest rank first. A record whose rank has grown moves when it reaches the top.
class Ranking {
    struct Item {
        Rank rank;  // at most the rank of the record
        int id;
    };
    std::vector<Item> heap;
    std::vector<Item> taken;  // during a search
    std::vector<int> place;   // of each record in the heap; NONE: absent

public:
    std::vector<Rank> ranks;  // changed by put only

    explicit Ranking(int records) : place(records, NONE), ranks(records) {}
    void put(int id, Rank rank) {
        ranks[id] = rank;
        if (place[id] == NONE) {
            heap.emplace_back();
            up(int(heap.size()) - 1, {rank, id});
        } else if (rank < heap[place[id]].rank) {
            up(place[id], {rank, id});
        }
    }
    void remove(int id) {
        int at = place[id];
        place[id] = NONE;
        Item last = heap.back();
        heap.pop_back();
        if (at == int(heap.size())) return;
        up(at, last);
        down(place[last.id], last);
    }
    template <class Free>
    int find(Free free) {  // the first free record, or NONE
        int found = NONE;
        while (found == NONE && !heap.empty()) {
            Item top = heap[0];
            if (top.rank != ranks[top.id]) {
                down(0, {ranks[top.id], top.id});
            } else if (free(top.id)) {
                found = top.id;
            } else {
                taken.push_back(top);
                remove(top.id);
            }
        }
        for (const Item& item : taken) put(item.id, item.rank);
        taken.clear();
        return found;
    }

private:
    void set(int at, const Item& item) {
        heap[at] = item;
        place[item.id] = at;
    }
    void up(int at, Item item) {
        for (int parent; at > 0 && item.rank < heap[parent = (at - 1) / 2].rank; at = parent) set(at, heap[parent]);
        set(at, item);
    }
    void down(int at, Item item) {
        int size = int(heap.size());
        for (int child; (child = 2 * at + 1) < size; at = child) {
            if (child + 1 < size && heap[child + 1].rank < heap[child].rank) ++child;
            if (!(heap[child].rank < item.rank)) break;
            set(at, heap[child]);
        }
        set(at, item);
    }
};

struct Ranked {
    Ranking ranking;
    int64_t clock = 0;

    explicit Ranked(const TierInfo& info) : ranking(info.records()) {}
    void evict(int id) { ranking.remove(id); }
    template <class Free>
    int victim(int, Free free) {
        return ranking.find(free);
    }
};

struct Lfu : Ranked {
    using Ranked::Ranked;
    void insert(int id) { ranking.put(id, {1, clock++}); }
    void hit(int id) { ranking.put(id, {ranking.ranks[id].first + 1, clock++}); }
};

struct LfuAgeing : Ranked {
    std::vector<double> uses;
    double age = 0;

    explicit LfuAgeing(const TierInfo& info) : Ranked(info), uses(info.records()) {}
    void insert(int id) {
        uses[id] = 0;
        hit(id);
    }
    void hit(int id) { ranking.put(id, {age + ++uses[id], clock++}); }
    void evict(int id) {
        age = std::max(age, ranking.ranks[id].first);
        ranking.remove(id);
    }
};

struct LruK : Ranked {
    int k;
    std::vector<int64_t> times;  // [records, k] rings
    std::vector<int64_t> uses;

    explicit LruK(const TierInfo& info)
        : Ranked(info), k(info.whole(0)), times(size_t(info.records()) * k), uses(info.records()) {}
    void insert(int id) { hit(id); }
    void hit(int id) {
        int64_t* ring = &times[size_t(id) * k];
        ring[uses[id]++ % k] = clock;
        ranking.put(id, {uses[id] >= k ? double(ring[uses[id] % k]) : -NEVER, clock});
        ++clock;
    }
};

struct Belady : Ranked {
    std::vector<int64_t> done;   // by record: index of its next use in times
    std::vector<int32_t> times;  // of all uses by record, each list ended by NONE

    explicit Belady(const TierInfo& info) : Ranked(info), done(info.records() + 1) {
        int64_t count = info.groups ? info.ends[info.groups - 1] : 0;
        for (int64_t at = 0; at < count; ++at) ++done[info.ids[at] + 1];
        for (int id = 0; id < info.records(); ++id) done[id + 1] += done[id] + 1;
        times.assign(size_t(done.back()), NONE);
        std::vector<int64_t> end = done;
        for (int64_t group = 0, at = 0; group < info.groups; ++group)
            for (; at < info.ends[group]; ++at) times[size_t(end[info.ids[at]]++)] = int32_t(group);
    }
    void insert(int id) { hit(id); }
    void hit(int id) {
        int32_t next = times[size_t(++done[id])];
        ranking.put(id, {next == NONE ? -NEVER : -double(next), id});
    }
};
