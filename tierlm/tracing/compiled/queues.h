// tierlm/policies/queues.py
#pragma once

#include <algorithm>
#include <vector>

#include "queue.h"
#include "recency.h"
#include "tier_info.h"

struct TwoQ {
    int limit, ghost_limit;
    Queue fresh, main, ghosts;

    explicit TwoQ(const TierInfo& info)
        : limit(info.whole(0)), ghost_limit(info.whole(1)), fresh(info.records()), main(info.records()),
          ghosts(info.records()) {}
    void insert(int id) {
        (ghosts.contains(id) ? main : fresh).push(id);
        ghosts.discard(id);
        ghosts.trim(ghost_limit);
    }
    void hit(int id) {
        if (main.contains(id)) main.move_to_end(id);
    }
    void evict(int id) {
        if (fresh.contains(id)) ghosts.push(id);
        (fresh.contains(id) ? fresh : main).erase(id);
    }
    template <class Free>
    int victim(int, Free free) {
        bool full = fresh.size() > limit;
        int found = (full ? fresh : main).find(free);
        return found != NONE ? found : (full ? main : fresh).find(free);
    }
};

struct S3Fifo {
    static constexpr int LIVES = 3;
    int slots, limit, ghost_limit, enough;
    Queue small, ghosts;
    Ring main;
    std::vector<int> uses;
    bool full = false;
    int offered = NONE;

    explicit S3Fifo(const TierInfo& info)
        : slots(info.slots), limit(info.whole(0)), ghost_limit(info.whole(1)), enough(info.whole(2)),
          small(info.records()), ghosts(info.records()), main(LIVES, info.records()),
          uses(info.records()) {}
    void insert(int id) {
        bool early = !full && small.size() >= limit;
        if (ghosts.contains(id) || early) {
            main.insert(id);
        } else {
            small.push(id);
            uses[id] = 0;
        }
        ghosts.discard(id);
        ghosts.trim(ghost_limit);
    }
    void hit(int id) {
        if (small.contains(id))
            ++uses[id];
        else
            main.spare(id);
    }
    void evict(int id) {
        full = true;
        if (id == offered)
            turn(id);
        else
            (small.contains(id) ? small : main.queue).erase(id);
    }
    template <class Free>
    int victim(int, Free free) {
        auto look = [&](int id) { return free(offered = id); };
        bool crowd = crowded();
        int found = NONE;
        if (!crowd) found = small.find([&](int id) { return uses[id] < enough && look(id); });
        if (found == NONE) found = main.find(look);
        if (found == NONE) found = small.find([&](int id) { return (crowd || uses[id] >= enough) && look(id); });
        return found;
    }

private:
    bool crowded() const { return main.queue.size() > slots - limit; }
    void turn(int id) {
        if (!crowded())
            for (int other = small.first(), next; other != small.end() && other != id; other = next) {
                next = small.after(other);
                if (uses[other] < enough) continue;
                small.erase(other);
                main.insert(other);
            }
        if (small.contains(id)) {
            small.erase(id);
            ghosts.push(id);
        } else {
            main.turn(id);
        }
    }
};

struct Arc {
    int slots;
    Queue once, again, once_ghosts, again_ghosts;
    int once_count = 0, again_count = 0;
    double target = 0;

    explicit Arc(const TierInfo& info)
        : slots(info.slots), once(info.records()), again(info.records()), once_ghosts(info.records()),
          again_ghosts(info.records()) {}
    void insert(int id) {
        target = adapted(id);
        bool back = once_ghosts.contains(id) || again_ghosts.contains(id);
        once_ghosts.discard(id);
        again_ghosts.discard(id);
        (back ? again : once).push(id);
        once_ghosts.trim(slots - once.size());
        again_ghosts.trim(2 * slots - once.size() - again.size() - once_ghosts.size());
        once_count = once_ghosts.size();
        again_count = again_ghosts.size();
    }
    void hit(int id) {
        once.discard(id);
        again.discard(id);
        again.push(id);
    }
    void evict(int id) {
        (once.contains(id) ? once_ghosts : again_ghosts).push(id);
        (once.contains(id) ? once : again).erase(id);
    }
    template <class Free>
    int victim(int incoming, Free free) {
        double wanted = adapted(incoming);
        int size = once.size();
        bool oldest = size > wanted || (size == wanted && again_ghosts.contains(incoming)) || size >= slots;
        int found = (oldest ? once : again).find(free);
        return found != NONE ? found : (oldest ? again : once).find(free);
    }

private:
    double adapted(int incoming) const {
        double ones = once_count, agains = again_count, most = slots;
        if (once_ghosts.contains(incoming)) return std::min(target + std::max(agains / std::max(ones, 1.0), 1.0), most);
        if (again_ghosts.contains(incoming)) return std::max(target - std::max(ones / std::max(agains, 1.0), 1.0), 0.0);
        return target;
    }
};
