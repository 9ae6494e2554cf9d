// Threads that share out small units of work, stage by stage.
//
// A job is a row of stages, a stage is a number of units. Any thread takes the next unit of the current stage from a
// counter; a stage begins when every unit of the one before it is done, whoever did them. So a thread that is not
// running (another process has its core) delays nobody, unless it holds a unit. Threads spin for a few microseconds
// where they must wait, then sleep.
//
//   work[stage]   job (24 bits) | units (20) | next unit (20): a thread that comes late sees another job and leaves
//   left[stage]   units not done yet; who takes it to zero raises `passed`
//   passed        stages that are over, of all jobs since the start; sleepers wait for it to change
//   job           number of the current job; idle threads wait for it to change
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

    // Do all units of all stages; `units` [stages]. The calling thread takes part.
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
    std::atomic<uint32_t> first{0}, num_stages{0};  // of the job: `passed` when it began; its stages
    std::atomic<bool> stopped{false};
    alignas(64) std::atomic<uint32_t> passed{0};
    std::atomic<uint32_t> sleepers{0};
    std::vector<std::thread> threads;
};
