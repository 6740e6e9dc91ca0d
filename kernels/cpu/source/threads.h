// One task on several threads.
#pragma once
#include <stdint.h>

// Runs parts `from` to `to` of a task.
typedef void (*part)(const void *arguments, int64_t from, int64_t to);

// Runs all `parts`, each of about `cost` multiplications, on the configured threads; returns when all are done.
void share(part run, const void *arguments, int64_t parts, int64_t cost);
