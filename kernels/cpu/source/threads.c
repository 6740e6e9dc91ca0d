// A pool that sleeps between tasks.
//
// The caller works too, and parts are distributed one lot at a time: a helper that the system has not woken yet, or has
// preempted, delays only the lot it holds. So more threads than free cores cost little, while a team whose members spin
// until all have finished would stall.
#include "threads.h"

#include <pthread.h>
#include <stdbool.h>

// Multiplications for which it pays to wake a helper: about 30 microseconds at 2e10 multiplications per second.
#define LOT 600000
#define MOST 64

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static int helpers, wanted;  // number of helpers that exist, and that a task may use
static struct {
    part run;
    const void *arguments;
    int64_t parts, lot, next;
    int busy;  // number of threads that hold a lot, without the caller
    bool open;
} task;

// Takes lots until none remains; the lock is held on entry and on return.
static void take_lots(bool helper) {
    while (task.next < task.parts) {
        const int64_t from = task.next, to = task.parts - from < task.lot ? task.parts : from + task.lot;
        const part run = task.run;
        const void *arguments = task.arguments;
        task.next = to;
        task.busy += helper;
        pthread_mutex_unlock(&lock);
        run(arguments, from, to);
        pthread_mutex_lock(&lock);
        task.busy -= helper;
    }
    if (helper && !task.busy) pthread_cond_signal(&done);
}

static void *help(void *index) {
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!task.open || task.next >= task.parts || (intptr_t)index >= wanted) pthread_cond_wait(&work, &lock);
        take_lots(true);
    }
    return 0;
}

int set_threads(int threads) {
    pthread_mutex_lock(&lock);
    wanted = (threads < MOST ? threads : MOST) - 1;
    while (helpers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, 0, help, (void *)(intptr_t)helpers)) break;
        pthread_detach(thread);
        helpers++;
    }
    if (wanted > helpers) wanted = helpers;
    const int now = wanted + 1;
    pthread_mutex_unlock(&lock);
    return now;
}

void share(part run, const void *arguments, int64_t parts, int64_t cost) {
    const int64_t lot = cost >= LOT ? 1 : (LOT + cost) / (cost + 1);
    if (wanted <= 0 || parts <= lot) return run(arguments, 0, parts);
    pthread_mutex_lock(&lock);
    if (task.open) {  // another caller uses the pool
        pthread_mutex_unlock(&lock);
        return run(arguments, 0, parts);
    }
    const int64_t fair = parts / (4 * (wanted + 1));
    task.run = run, task.arguments = arguments, task.parts = parts, task.next = 0, task.open = true;
    task.lot = fair > lot ? fair : lot;
    pthread_cond_broadcast(&work);
    take_lots(false);
    while (task.busy) pthread_cond_wait(&done, &lock);
    task.open = false;
    pthread_mutex_unlock(&lock);
}
