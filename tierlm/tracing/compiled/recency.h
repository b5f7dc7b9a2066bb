// tierlm/policies/recency.py
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "queue.h"
#include "tier_info.h"

struct Fifo {
    Queue queue;

    explicit Fifo(const TierInfo& info) : queue(info.records()) {}
    void insert(int id) { queue.push(id); }
    void hit(int) {}
    void evict(int id) { queue.erase(id); }
    template <class Free>
    int victim(int, Free free) {
        return queue.find(free);
    }
};

struct Lru : Fifo {
    using Fifo::Fifo;
    void hit(int id) { queue.move_to_end(id); }
};

struct LayerLru {
    int experts, slots;
    std::vector<Queue> orders;  // by layer
    std::vector<int> seen;      // layers in order of appearance
    std::vector<char> tried;    // by layer, during one search

    explicit LayerLru(const TierInfo& info)
        : experts(info.experts), slots(info.slots), orders(info.layers, Queue(experts)),
          tried(info.layers) {}
    void insert(int id) {
        int layer = id / experts;
        if (std::find(seen.begin(), seen.end(), layer) == seen.end()) seen.push_back(layer);
        orders[layer].push(id % experts);
    }
    void hit(int id) { orders[id / experts].move_to_end(id % experts); }
    void evict(int id) { orders[id / experts].erase(id % experts); }
    template <class Free>
    int victim(int incoming, Free free) {
        std::fill(tried.begin(), tried.end(), 0);
        int layer = incoming / experts;
        if (orders[layer].size() == 0 || orders[layer].size() * int(seen.size()) < slots) layer = longest();
        for (; layer != NONE; layer = longest()) {
            tried[layer] = 1;
            int found = orders[layer].find([&](int expert) { return free(layer * experts + expert); });
            if (found != NONE) return layer * experts + found;
        }
        return NONE;
    }

private:
    int longest() const {  // of the layers not yet tried
        int best = NONE;
        for (int layer : seen)
            if (!tried[layer] && (best == NONE || orders[layer].size() > orders[best].size())) best = layer;
        return best;
    }
};

struct Ring {
    int most;
    Queue queue;
    std::vector<int> lives;

    Ring(int most, int records) : most(most), queue(records), lives(records) {}
    void insert(int id) {
        queue.push(id);
        lives[id] = 0;
    }
    void spare(int id) { lives[id] = std::min(lives[id] + 1, most); }
    void turn(int id) {
        for (;;) {
            int other = queue.pop();
            if (other == id && lives[id] == 0) return;
            lives[other] = std::max(0, lives[other] - 1);
            queue.push(other);
        }
    }
    template <class Wanted>
    int find(Wanted wanted) const {
        int found = NONE;
        for (int left = 0; left <= most && found == NONE; ++left)
            found = queue.find([&](int id) { return lives[id] == left && wanted(id); });
        return found;
    }
};

struct Clock {
    Ring ring;
    int offered = NONE;

    explicit Clock(const TierInfo& info) : ring(info.whole(0), info.records()) {}
    void insert(int id) { ring.insert(id); }
    void hit(int id) { ring.spare(id); }
    void evict(int id) {
        if (id == offered)
            ring.turn(id);
        else
            ring.queue.erase(id);
    }
    template <class Free>
    int victim(int, Free free) {
        return ring.find([&](int id) { return free(offered = id); });
    }
};

struct Sieve {
    Queue ahead, behind;
    std::vector<char> used;
    int offered = NONE;

    explicit Sieve(const TierInfo& info)
        : ahead(info.records()), behind(info.records()), used(info.records()) {}
    void insert(int id) {
        ahead.push(id);
        used[id] = 0;
    }
    void hit(int id) { used[id] = 1; }
    void evict(int id) {
        if (id != offered) {
            (ahead.contains(id) ? ahead : behind).erase(id);
            return wrap();
        }
        for (bool found = false; !found; wrap()) {
            int under = ahead.pop();  // under the hand
            found = under == id && !used[id];
            if (!found) {
                behind.push(under);
                used[under] = 0;
            }
        }
    }
    template <class Free>
    int victim(int, Free free) {
        for (char wanted : {0, 1})
            for (const Queue* part : {&ahead, &behind}) {
                int found = part->find([&](int id) { return used[id] == wanted && free(offered = id); });
                if (found != NONE) return found;
            }
        return NONE;
    }

private:
    void wrap() {
        if (ahead.size() == 0) std::swap(ahead, behind);
    }
};
