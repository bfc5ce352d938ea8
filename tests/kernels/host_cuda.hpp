// CUDA on the host, as far as the kernels need it: every thread of a block is a thread of the system, and each block
// of a cluster is a copy of this library, whose static variables are the block's shared memory. Copies and sends
// between blocks are made by another thread, late and in any order; a copy's place holds nan from the moment it is
// asked for.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct float4 {
    float x, y, z, w;
};

namespace host {

constexpr auto PATIENCE = std::chrono::seconds(10);

struct Stuck : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// All of `count` threads meet here; a thread that waits too long gives up.
class Meeting {
  public:
    explicit Meeting(int count) : count(count) {}

    void wait() {
        std::unique_lock lock(mutex);
        const int mine = generation;
        if (++arrived == count) {
            arrived = 0;
            ++generation;
            changed.notify_all();
        } else if (!changed.wait_for(lock, PATIENCE, [&] { return generation != mine; })) {
            throw Stuck("threads wait for others that never come");
        }
    }

  private:
    const int count;
    int arrived = 0, generation = 0;
    std::mutex mutex;
    std::condition_variable changed;
};

struct Warp {
    Meeting meeting{32};
    float values[32];
};

struct Cluster;

struct Block {
    int rank, threads;
    Meeting meeting;
    std::vector<Warp> warps;
    Cluster* cluster;
    char* base;  // of this copy's static variables

    Block(int rank, int threads, Cluster* cluster, char* base)
        : rank(rank), threads(threads), meeting(threads), warps(threads / 32), cluster(cluster), base(base) {}
};

// An mbarrier as it lies in its 8 bytes.
struct BarrierState {
    int32_t bytes;
    int16_t pending, phase;
};

struct Cluster {
    std::vector<Block*> blocks;
    Meeting meeting;
    std::mutex mutex;  // of barriers and of the queue
    std::condition_variable changed;
    std::vector<std::function<void()>> queue;  // copies on their way
    bool done = false;
    std::mt19937 random;

    Cluster(int threads, int seed) : meeting(threads), random(seed) {}

    void update(uint64_t* barrier, int arrivals, int bytes) {  // under the mutex
        BarrierState s;
        memcpy(&s, barrier, 8);
        s.pending -= int16_t(arrivals), s.bytes += bytes;
        if (s.pending < 0) throw Stuck("a barrier has seen more than its one arrival");
        if (s.pending == 0 && s.bytes == 0) s.pending = 1, s.phase ^= 1;
        memcpy(barrier, &s, 8);
        changed.notify_all();
    }

    void wait(const uint64_t* barrier, uint32_t parity) {
        std::unique_lock lock(mutex);
        const auto ended = [&] {
            BarrierState s;
            memcpy(&s, barrier, 8);
            return uint32_t(s.phase) != parity;
        };
        if (!changed.wait_for(lock, PATIENCE, ended)) throw Stuck("a barrier's phase does not end");
    }

    void later(std::function<void()> copy) {
        const std::lock_guard lock(mutex);
        queue.push_back(std::move(copy));
        changed.notify_all();
    }

    void carry() {  // the thread that makes the copies
        std::unique_lock lock(mutex);
        while (true) {
            changed.wait(lock, [&] { return done || !queue.empty(); });
            if (queue.empty()) return;
            lock.unlock();
            std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
            lock.lock();
            std::swap(queue[random() % queue.size()], queue.back());
            const auto copy = std::move(queue.back());
            queue.pop_back();
            copy();
        }
    }
};

inline thread_local Block* block;

struct Index {
    unsigned x, y, z;
};

}  // namespace host

inline thread_local host::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { host::block->meeting.wait(); }

inline float __shfl_xor_sync(unsigned, float value, int lanes) {
    host::Warp& warp = host::block->warps[threadIdx.x / 32];
    warp.values[threadIdx.x % 32] = value;
    warp.meeting.wait();
    const float other = warp.values[(threadIdx.x % 32) ^ lanes];
    warp.meeting.wait();
    thread_local std::minstd_rand pace(threadIdx.x + 1);  // a warp's first lane falls behind by chance, and so the warp
    if (threadIdx.x % 32 == 0) std::this_thread::sleep_for(std::chrono::microseconds(pace() % 200));
    return other;
}
