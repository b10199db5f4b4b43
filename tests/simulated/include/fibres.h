// Threads of a block on one core. Each thread of a block is a fibre with a stack of its own; it
// runs until it has to wait for others (at a barrier or in a shuffle) or ends. A kernel that never waits runs
// all its threads on one stack, one after the other.

#pragma once

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <ucontext.h>


#include "vectors.h"

namespace sim {

constexpr int MOST_THREADS = 1024;
constexpr size_t STACK = 128 << 10, GUARD = 4096;

// ---- errors: a launch ends at once, and its message becomes a Python exception -----------------------------

inline char message[512];
inline sigjmp_buf escape;
inline void* fault_address;  // the instruction that trapped

[[noreturn]] inline void leave() { siglongjmp(escape, 1); }

[[noreturn]] __attribute__((noinline, format(printf, 1, 2))) inline void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int used = vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    if (used < int(sizeof message) - 100) {
        snprintf(message + used, sizeof message - used, " [block (%u, %u, %u), thread (%u, %u, %u)]",
                 blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y,
                 threadIdx.z);
    }
    leave();
}

// ---- fibres --------------------------------------------------------------------------------------------

enum State : int { NEW, READY, AT_BARRIER, IN_WARP, DONE };
enum Kind : int { SYNC, SHUFFLE, BALLOT };

struct Stack {
#if defined(__x86_64__)
    void* pointer;
#else
    ucontext_t context;
#endif
};

struct Thread {
    int state, stack, kind, source;
    unsigned mask;
    uint64_t value, result;
    uint3 index;
};

inline Thread threads[MOST_THREADS];
inline Stack stacks[MOST_THREADS], scheduler;
inline int idle[MOST_THREADS], idle_count, stacks_made;  // stacks whose thread has ended
inline int current, thread_count, living;
inline void (*kernel)(void**);
inline void** kernel_arguments;

#if defined(__x86_64__)
extern "C" __attribute__((visibility("hidden"))) void sim_switch(void** from, void* to);
asm(R"(
.text
.type sim_switch, @function
sim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size sim_switch, .-sim_switch
)");
inline void change(Stack& from, Stack& to) { sim_switch(&from.pointer, to.pointer); }
#else
inline void change(Stack& from, Stack& to) { swapcontext(&from.context, &to.context); }
#endif

// what each stack runs: one thread after the other
inline void stack_body() {
    for (;;) {
        kernel(kernel_arguments);
        int stack = threads[current].stack;
        threads[current].state = DONE;
        idle[idle_count++] = stack;
        living--;
        change(stacks[stack], scheduler);
    }
}

// Memory for all stacks, each above a page that nobody may touch. One kernel runs at a time, so that one is
// enough for all libraries: with one for each of them a process would have more mappings than a kernel allows.
inline char* stack_memory;
inline void* make_stacks() {
    void* memory = mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    for (int i = 0; i < MOST_THREADS; i++) {
        if (mprotect(static_cast<char*>(memory) + i * STACK, GUARD, PROT_NONE) != 0) return nullptr;
    }
    return memory;
}

inline void prepare(int number) {
    char* memory = stack_memory + number * STACK;
    Stack& stack = stacks[number];
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(memory + STACK - 64);
    *--top = nullptr;                                 // where stack_body would return to
    *--top = reinterpret_cast<void*>(&stack_body);    // where sim_switch returns to
    for (int i = 0; i < 6; i++) *--top = nullptr;     // the registers that it restores
    stack.pointer = top;
#else
    getcontext(&stack.context);
    stack.context.uc_stack.ss_sp = memory;
    stack.context.uc_stack.ss_size = STACK;
    makecontext(&stack.context, &stack_body, 0);
#endif
}

inline int take_stack() {
    if (idle_count > 0) return idle[--idle_count];
    prepare(stacks_made);
    return stacks_made++;
}

inline void wait_for_others(Thread& me) { change(stacks[me.stack], scheduler); }

inline void resume(int number) {
    Thread& thread = threads[number];
    if (thread.state == NEW) thread.stack = take_stack();
    thread.state = READY;
    current = number;
    threadIdx = thread.index;
    change(scheduler, stacks[thread.stack]);
}

// ---- barriers and warps -----------------------------------------------------------------------------------

struct Votes {
    int count, threads;
};
inline int arrived, barrier_votes, barrier_line;
inline Votes last_votes;

inline void release_barrier() {
    last_votes = {barrier_votes, arrived};
    arrived = barrier_votes = 0;
    for (int i = 0; i < thread_count; i++) {
        if (threads[i].state == AT_BARRIER) threads[i].state = READY;
    }
}

inline Votes barrier(int line, int vote) {
    Thread& me = threads[current];
    if (arrived == 0) barrier_line = line;
    if (barrier_line != line) fail("threads wait at different __syncthreads: lines %d and %d", barrier_line, line);
    me.state = AT_BARRIER;
    arrived++;
    barrier_votes += vote;
    wait_for_others(me);
    return last_votes;
}

inline int lane() { return current % 32; }

// Gives each lane of the mask its result once all of them have come; those that have ended count as there.
inline bool complete_warp(int number) {
    int first = number / 32 * 32, lanes = thread_count - first < 32 ? thread_count - first : 32;
    Thread* warp = threads + first;
    Thread& me = threads[number];
    unsigned ballot = 0;
    for (int i = 0; i < lanes; i++) {
        if (!(me.mask >> i & 1) || warp[i].state == DONE) continue;
        if (warp[i].state != IN_WARP) return false;
        if (warp[i].mask != me.mask || warp[i].kind != me.kind)
            fail("lanes of a warp disagree: lane %d calls with mask %08x, lane %d with %08x, or another function",
                 number - first, me.mask, i, warp[i].mask);
        ballot |= unsigned(warp[i].value & 1) << i;
    }
    for (int i = 0; i < lanes; i++) {
        if (!(me.mask >> i & 1) || warp[i].state == DONE) continue;
        if (me.kind == BALLOT) warp[i].result = ballot;
        if (me.kind == SHUFFLE) {
            int source = warp[i].source;
            if (source >= lanes || !(me.mask >> source & 1) || warp[source].state == DONE)
                fail("lane %d shuffles from lane %d, which does not take part (%s)", i, source,
                     source >= lanes ? "the block ends before it" : "it has ended or is not in the mask");
            warp[i].result = warp[source].value;
        }
    }
    for (int i = 0; i < lanes; i++) {
        if (me.mask >> i & 1 && warp[i].state == IN_WARP) warp[i].state = READY;
    }
    return true;
}

inline uint64_t warp(Kind kind, unsigned mask, uint64_t value, int source) {
    Thread& me = threads[current];
    if (!(mask >> lane() & 1)) fail("lane %d is not in its own mask %08x", lane(), mask);
    me.kind = kind, me.mask = mask, me.value = value, me.source = source;
    me.state = IN_WARP;
    if (!complete_warp(current)) wait_for_others(me);
    return me.result;
}

}  // namespace sim
