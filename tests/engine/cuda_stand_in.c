/* Stands in for GDRCopy's library and parts of the CUDA driver where "device memory" is the process's own: checks that
 * every call is one that the real ones take, and counts what is open. */
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PAGE 65536UL
#define MOST 256

typedef struct { unsigned long h; } gdr_mh_t;
static struct { unsigned long start; size_t size; int pinned, mapped; } pins[MOST];
static int sessions, flushes, refuse_map, refuse_open;
static unsigned long written;

void *gdr_open(void) { return refuse_open ? NULL : (void *)(uintptr_t)(0x1000 + ++sessions); }
int gdr_close(void *session) { return session ? (--sessions, 0) : EINVAL; }

int gdr_pin_buffer(void *session, unsigned long address, size_t size, uint64_t token, uint32_t space, gdr_mh_t *handle) {
    if (!session || address % PAGE || size % PAGE || !size || token || space) return EINVAL;
    for (unsigned long n = 0; n < MOST; n++)
        if (!pins[n].pinned) {
            pins[n].start = address; pins[n].size = size; pins[n].pinned = 1; pins[n].mapped = 0;
            handle->h = n + 7;
            return 0;
        }
    return ENOMEM;
}

static int of(gdr_mh_t handle) { return handle.h >= 7 && handle.h < MOST + 7 && pins[handle.h - 7].pinned ? (int)handle.h - 7 : -1; }

int gdr_unpin_buffer(void *session, gdr_mh_t handle) {
    int n = of(handle);
    if (!session || n < 0 || pins[n].mapped) return EINVAL;
    pins[n].pinned = 0;
    return 0;
}

int gdr_map(void *session, gdr_mh_t handle, void **mapped, size_t size) {
    int n = of(handle);
    if (!session || n < 0 || size != pins[n].size) return EINVAL;
    if (refuse_map) return EAGAIN;
    pins[n].mapped = 1;
    *mapped = (void *)pins[n].start;
    return 0;
}

int gdr_unmap(void *session, gdr_mh_t handle, void *mapped, size_t size) {
    int n = of(handle);
    if (!session || n < 0 || !pins[n].mapped || mapped != (void *)pins[n].start || size != pins[n].size) return EINVAL;
    pins[n].mapped = 0;
    return 0;
}

int gdr_copy_to_mapping(gdr_mh_t handle, void *to, const void *from, size_t size) {
    int n = of(handle);
    unsigned long at = (unsigned long)to;
    if (n < 0 || !pins[n].mapped || at < pins[n].start || at + size > pins[n].start + pins[n].size) return EINVAL;
    memmove(to, from, size);
    __atomic_add_fetch(&written, size, __ATOMIC_RELAXED);
    return 0;
}

int cuFlushGPUDirectRDMAWrites(int target, int scope) { return target == 0 && scope == 100 ? (flushes++, 0) : 1; }

int cuMemcpyHtoDAsync_v2(unsigned long long to, const void *from, size_t size, void *stream) {
    if (stream != (void *)0x5eed) return 400;
    memcpy((void *)to, from, size);
    return 0;
}

int stand_in_flushes(void) { return flushes; }
unsigned long stand_in_written(void) { return written; }
void stand_in_refuse(int open, int map) { refuse_open = open; refuse_map = map; }
int stand_in_left_open(void) {
    int count = sessions;
    for (int n = 0; n < MOST; n++) count += pins[n].pinned + pins[n].mapped;
    return count;
}
