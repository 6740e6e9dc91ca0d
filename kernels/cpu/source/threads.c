// A pool that sleeps between tasks.
//
// The caller works too, and parts are handed out one lot at a time: a helper that the system has not woken yet, or has
// put off the processor, delays nothing but the lot it holds. So more threads than free cores cost little, where a
// team that waits for each of its members by spinning comes to a halt.
#include "threads.h"

#include <pthread.h>
#include <stdbool.h>

// A lot is worth waking somebody for: about 30 microseconds at 2e10 multiplications a second.
#define LOT 600000
#define MOST 64

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static int helpers, wanted;  // helpers that exist, and that a task may use
static struct {
    part run;
    const void *arguments;
    int64_t parts, lot, next;
    int busy;  // threads that hold a lot, the caller's not counted
    bool open;
} task;

// Takes lots until none is left; the lock is held on entry and on return.
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
    if (task.open) {  // another caller has the pool
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
