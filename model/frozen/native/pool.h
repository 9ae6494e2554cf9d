// A pool of threads that share small units of work, stage by stage.
//
// A job is a sequence of stages, and a stage is a number of units. Each thread takes the next unit of the current stage
// from a counter. A stage begins when all units of the stage before it are done. So a thread that is not running
// (another process has its core) delays the others only if it holds a unit. A thread that must wait spins for a few
// microseconds, then sleeps.
//
//   work[stage]   job (24 bits) | units (20) | next unit (20): a late thread sees the number of another job and leaves
//   left[stage]   number of units not done yet; the thread that makes it zero raises `passed`
//   passed        number of ended stages, of all jobs since the start; threads that wait for a stage sleep on it
//   job           number of the current job; idle threads sleep on it
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

struct Pool {
    using Unit = void (*)(void* context, int stage, int unit, int thread);
    using Hook = uint32_t (*)();
    using Unhook = void (*)(uint32_t);

    Pool(int num_threads, int max_stages, Hook enter, Unhook leave);
    ~Pool();

    // Do all units of all stages, and return; `units` [stages] are their numbers. The calling thread works too.
    void run(const int* units, int num_stages, Unit unit, void* context);

    const int num_threads;

private:
    void serve(int thread);
    void take_part(uint32_t number, int thread);
    bool await(uint32_t number, uint32_t wanted);

    Hook enter;
    Unhook leave;
    Unit unit = nullptr;
    void* context = nullptr;
    std::vector<std::atomic<uint64_t>> work;
    std::vector<std::atomic<uint32_t>> left;
    alignas(64) std::atomic<uint32_t> job{0};
    std::atomic<uint32_t> first{0}, num_stages{0};  // of the job: `passed` at its start; its number of stages
    std::atomic<bool> stopped{false};
    alignas(64) std::atomic<uint32_t> passed{0};
    std::atomic<uint32_t> sleepers{0};
    std::vector<std::thread> threads;
};
