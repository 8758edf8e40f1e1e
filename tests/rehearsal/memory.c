/* Memory of the stand-in for the CUDA runtime: addresses of the device are addresses of the process. */
#define _GNU_SOURCE
#include "runtime.h"
#include <pthread.h>
#include <sys/mman.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static const size_t POISONED_BYTES = 64ULL << 20, LARGE_PAGE = 2ULL << 20;
static Range ranges[1 << 16];
static int num_ranges;
static size_t used_bytes;

static size_t whole_pages(size_t size) { return (size + LARGE_PAGE - 1) & ~(LARGE_PAGE - 1); }

static void add_range(void *start, size_t size, enum Kind kind) {
  pthread_mutex_lock(&lock);
  ranges[num_ranges++] = (Range){start, size, kind};
  if (kind == DEVICE) used_bytes += size;
  pthread_mutex_unlock(&lock);
}

static cudaError_t allocate(void **start, size_t size, enum Kind kind) {
  *start = mmap(NULL, whole_pages(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*start == MAP_FAILED) return cudaErrorMemoryAllocation;
  if (size <= POISONED_BYTES) memset(*start, 0xA5, size); /* larger ones would cost the machine its memory */
  add_range(*start, size, kind);
  return cudaSuccess;
}

static cudaError_t release(void *start) {
  cudaError_t code = cudaErrorInvalidValue;
  pthread_mutex_lock(&lock);
  for (int n = 0; n < num_ranges; n++) {
    if (ranges[n].start != start) continue;
    if (ranges[n].kind == DEVICE) used_bytes -= ranges[n].size;
    if (ranges[n].kind != REGISTERED) munmap(start, whole_pages(ranges[n].size));
    ranges[n] = ranges[--num_ranges];
    code = cudaSuccess;
    break;
  }
  pthread_mutex_unlock(&lock);
  return code;
}

Range range_of(const void *address) {
  Range found = {NULL, 0, PAGEABLE};
  pthread_mutex_lock(&lock);
  for (int n = 0; n < num_ranges; n++)
    if ((char *)address >= ranges[n].start && (char *)address < ranges[n].start + ranges[n].size) found = ranges[n];
  pthread_mutex_unlock(&lock);
  return found;
}

int leaves(Range range, const void *address, size_t size) {
  return range.kind != PAGEABLE && (char *)address + size > range.start + range.size;
}

int kind_of(const void *address) { return range_of(address).kind; }

cudaError_t cudaMalloc(void **start, size_t size) {
  SAFE();
  if (used_bytes + size > DEVICE_BYTES - RESERVED_BYTES) RETURN(cudaErrorMemoryAllocation);
  RETURN(allocate(start, size, DEVICE));
}
cudaError_t cudaMallocAsync(void **start, size_t size, cudaStream_t stream) { return cudaMalloc(start, size); }
cudaError_t cudaFree(void *start) {
  if (!start) RETURN(cudaSuccess);
  SAFE();
  wait_for_all();
  RETURN(release(start));
}
cudaError_t cudaFreeAsync(void *start, cudaStream_t stream) { return cudaFree(start); }
cudaError_t cudaHostAlloc(void **start, size_t size, unsigned flags) { SAFE(); RETURN(allocate(start, size, PINNED)); }
cudaError_t cudaFreeHost(void *start) {
  wait_for_all();
  RETURN(release(start));
}
cudaError_t cudaHostRegister(void *start, size_t size, unsigned flags) {
  add_range(start, size, REGISTERED);
  RETURN(cudaSuccess);
}
cudaError_t cudaHostUnregister(void *start) { RETURN(release(start)); }
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  *total_bytes = DEVICE_BYTES;
  *free_bytes = DEVICE_BYTES - RESERVED_BYTES - used_bytes;
  RETURN(cudaSuccess);
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
  enum Kind kind = range_of(address).kind;
  memset(found, 0, sizeof *found);
  found->type = kind == DEVICE ? cudaMemoryTypeDevice : kind ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  found->device = kind ? 0 : -2;
  found->devicePointer = kind ? (void *)address : NULL;
  found->hostPointer = kind == DEVICE ? NULL : (void *)address;
  RETURN(cudaSuccess);
}

cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t at, enum cudaMemcpyKind kind) {
  RETURN(cudaSuccess);
}
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
  static char room[1 << 20];
  *address = room;
  RETURN(cudaSuccess);
}
