// Records in order, like an OrderedDict without values.
#pragma once

#include <vector>

constexpr int NONE = -1;

// Holds each of the records 0 to n - 1 at most once. All methods but find and trim are O(1).
class Queue {
    std::vector<int> next, prev;  // circular through end(); NONE: not in the queue
    int count = 0;

public:
    explicit Queue(int records) : next(records + 1, NONE), prev(records + 1, NONE) {
        next[records] = prev[records] = records;
    }
    int end() const { return int(next.size()) - 1; }
    int first() const { return next[end()]; }
    int after(int id) const { return next[id]; }
    int size() const { return count; }
    bool contains(int id) const { return next[id] != NONE; }

    void push(int id) {  // append an absent record
        int last = prev[end()];
        next[last] = prev[end()] = id;
        prev[id] = last, next[id] = end();
        ++count;
    }
    void erase(int id) {
        next[prev[id]] = next[id];
        prev[next[id]] = prev[id];
        next[id] = prev[id] = NONE;
        --count;
    }
    void discard(int id) {
        if (contains(id)) erase(id);
    }
    void move_to_end(int id) {
        erase(id);
        push(id);
    }
    int pop() {
        int id = first();
        erase(id);
        return id;
    }
    void trim(int limit) {
        while (count > 0 && count > limit) pop();
    }
    template <class Wanted>
    int find(Wanted wanted) const {  // the first wanted record, or NONE
        for (int id = first(); id != end(); id = next[id])
            if (wanted(id)) return id;
        return NONE;
    }
};
