// A CUDA driver with one made-up GPU (SM 8.9), stricter than a real one. Device memory has addresses that the host cannot
// read; copies and kernels wait in their stream until somebody waits for it; what is captured does not run.
// -DCHECK compares every prototype with NVIDIA's cuda.h.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef CHECK
#include <cuda.h>
#else
typedef int CUresult, CUdevice, CUdevice_attribute, CUstreamCaptureMode;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st* CUcontext;
typedef struct CUstream_st* CUstream;
typedef struct CUgraph_st* CUgraph;
typedef struct CUevent_st* CUevent;
typedef struct CUgraphExec_st* CUgraphExec;
#define cuDevicePrimaryCtxRelease cuDevicePrimaryCtxRelease_v2
#define cuMemAlloc cuMemAlloc_v2
#define cuMemFree cuMemFree_v2
#define cuMemHostGetDevicePointer cuMemHostGetDevicePointer_v2
#define cuMemcpyHtoDAsync cuMemcpyHtoDAsync_v2
#define cuMemcpyDtoHAsync cuMemcpyDtoHAsync_v2
#define cuStreamDestroy cuStreamDestroy_v2
#define cuEventDestroy cuEventDestroy_v2
#define cuStreamBeginCapture cuStreamBeginCapture_v2
#endif

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, ILLEGAL_ADDRESS = 700, LAUNCH_FAILED = 719,
       CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901 };
enum { UPLOADS, DOWNLOADS, KERNELS, LAUNCHES, CAPTURES, ALLOCATIONS, SYNCHRONIZATIONS, LIVE, RETAINED, COUNTS };
enum { UP, DOWN, CLEAR, KERNEL };
#define DEVICE_OFFSET (1ull << 46)
#define MAPPED_OFFSET (1ull << 45)
#define MANY 4096

typedef struct { char* data; size_t size; int host; } Block;
typedef struct { int kind; CUdeviceptr device; char* host; char* copy; size_t size; int (*kernel)(int); int id; } Work;
typedef struct { Work* work; int count; } List;
struct CUstream_st { List list; CUgraph capturing; int broken; long done; };    // done: how much of its work has run
struct CUevent_st { CUstream stream; long mark; };                              // passed when its stream has done so much
struct CUgraph_st { List list; };
struct CUgraphExec_st { List list; };

static Block blocks[MANY];
static CUstream streams[MANY];
static long counts[COUNTS];
static size_t used, room = (size_t)-1;
static int integrated;
static struct CUctx_st { int unused; } the_context;
static __thread CUcontext current;

// --- for the tests ---
long* fake_counts(void) { return counts; }
void fake_setup(int is_integrated, size_t bytes) { integrated = is_integrated, room = bytes; }

// The host's view of a device address, NULL unless [address, address + size) is memory that is there.
char* fake_resolve(CUdeviceptr address, size_t size) {
  for (Block* b = blocks; b < blocks + MANY; ++b) {
    if (b->data == NULL) continue;
    const CUdeviceptr start = (CUdeviceptr)(uintptr_t)b->data + (b->host ? MAPPED_OFFSET : DEVICE_OFFSET);
    if (address >= start && address + size <= start + b->size) return b->data + (address - start);
  }
  return NULL;
}
int fake_is_current(void) { return current == &the_context; }
int fake_is_capturing(CUstream s) { return s->capturing != NULL; }
void fake_break_capture(CUstream s) { s->broken = 1; }

static int is_stream(CUstream s) {
  for (int i = 0; i < MANY; ++i)
    if (streams[i] == s) return s != NULL;
  return 0;
}
static int is_pinned(const char* p, size_t size) {
  for (Block* b = blocks; b < blocks + MANY; ++b)
    if (b->data && b->host && p >= b->data && p + size <= b->data + b->size) return 1;
  return 0;
}
// Freeing what a capture may use, and waiting, are not allowed while this thread captures.
static int spoils_capture(void) {
  int spoiled = 0;
  for (int i = 0; i < MANY; ++i)
    if (streams[i] && streams[i]->capturing) spoiled = streams[i]->broken = 1;
  return spoiled;
}
static void append(List* list, Work work) {
  list->work = realloc(list->work, (list->count + 1) * sizeof(Work));
  list->work[list->count++] = work;
}
static void clear(List* list) {
  for (int i = 0; i < list->count; ++i) free(list->work[i].copy);
  free(list->work);
  *list = (List){0};
}
static int run_one(Work w) {
  if (w.kind == KERNEL) return ++counts[KERNELS], w.kernel(w.id) ? LAUNCH_FAILED : 0;
  char* device = fake_resolve(w.device, w.size);
  if (!device) return ILLEGAL_ADDRESS;
  if (w.kind == CLEAR) return memset(device, 0, w.size), 0;
  char* host = w.copy ? w.copy : w.host;
  if (!w.copy && !is_pinned(host, w.size)) return ILLEGAL_ADDRESS;
  ++counts[w.kind == UP ? UPLOADS : DOWNLOADS];
  if (w.kind == UP) memcpy(device, host, w.size);
  else memcpy(host, device, w.size);
  return 0;
}
// Run the first `count` of a stream's work, which are then gone from it.
static int run(CUstream s, int count) {
  int status = 0;
  for (int i = 0; i < count; ++i) {
    if (!status) status = run_one(s->list.work[i]);
    free(s->list.work[i].copy);
  }
  s->list.count -= count, s->done += count;
  if (count) memmove(s->list.work, s->list.work + count, s->list.count * sizeof(Work));
  return status;
}
static int queue(CUstream s, Work w) {
  if (!fake_is_current()) return INVALID_CONTEXT;
  if (!is_stream(s)) return INVALID_VALUE;
  append(s->capturing ? &s->capturing->list : &s->list, w);
  return 0;
}
int fake_kernel(CUstream s, int (*kernel)(int), int id) { return queue(s, (Work){.kind = KERNEL, .kernel = kernel, .id = id}); }

static int allocate(size_t size, int host, char** data) {
  if (!fake_is_current()) return INVALID_CONTEXT;
  if (size == 0) return INVALID_VALUE;
  if (!host && used + size > room) return OUT_OF_MEMORY;
  for (Block* b = blocks; b < blocks + MANY; ++b) {
    if (b->data) continue;
    *b = (Block){aligned_alloc(256, (size + 255) / 256 * 256), size, host};
    memset(b->data, 0xff, size);  // NaN, until something is written
    used += host ? 0 : size;
    ++counts[ALLOCATIONS], ++counts[LIVE];
    *data = b->data;
    return 0;
  }
  return OUT_OF_MEMORY;
}
static int release(const char* data, int host) {
  if (!fake_is_current()) return INVALID_CONTEXT;
  if (spoils_capture()) return CAPTURE_UNSUPPORTED;
  for (Block* b = blocks; b < blocks + MANY; ++b) {
    if (b->data != data || b->host != host) continue;
    used -= host ? 0 : b->size;
    free(b->data);
    *b = (Block){0};
    --counts[LIVE];
    return 0;
  }
  return INVALID_VALUE;
}

// --- the driver ---
CUresult cuInit(unsigned int flags) { return flags; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, 0; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, 0; }
CUresult cuDeviceGet(CUdevice* device, int number) { return *device = 7, number; }
CUresult cuDeviceGetName(char* name, int size, CUdevice device) { return strncpy(name, "Made up", size), device != 7; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute a, CUdevice device) {
  *value = a == 75 ? 8 : a == 76 ? 9 : a == 18 ? integrated : -1;
  return device != 7;
}
CUresult cuGetErrorName(CUresult error, const char** name) {
  *name = error == LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : error == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "OTHER";
  return 0;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  ++counts[RETAINED];
  return *context = &the_context, device != 7;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device) { return --counts[RETAINED], device != 7; }
CUresult cuCtxSetCurrent(CUcontext context) { return current = context, context != &the_context; }

CUresult cuMemAlloc(CUdeviceptr* address, size_t size) {
  char* data;
  const int status = allocate(size, 0, &data);
  return status ? status : (*address = (CUdeviceptr)(uintptr_t)data + DEVICE_OFFSET, 0);
}
CUresult cuMemFree(CUdeviceptr address) { return release((char*)(uintptr_t)(address - DEVICE_OFFSET), 0); }
CUresult cuMemHostAlloc(void** host, size_t size, unsigned int flags) {
  if (flags != 3) return INVALID_VALUE;
  return allocate(size, 1, (char**)host);
}
CUresult cuMemFreeHost(void* host) { return release(host, 1); }
CUresult cuMemHostGetDevicePointer(CUdeviceptr* address, void* host, unsigned int flags) {
  if (flags || !is_pinned(host, 1)) return INVALID_VALUE;
  return *address = (CUdeviceptr)(uintptr_t)host + MAPPED_OFFSET, 0;
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t size, CUstream s) {
  Work w = {.kind = UP, .device = to, .host = (char*)from, .size = size};
  if (!is_stream(s) || !fake_resolve(to, size)) return INVALID_VALUE;
  if (!is_pinned(from, size)) {
    if (s->capturing) return s->broken = 1, CAPTURE_UNSUPPORTED;
    w.copy = memcpy(malloc(size), from, size);  // as the driver does with memory that could be moved
  }
  return queue(s, w);
}
CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t size, CUstream s) {
  if (!is_pinned(to, size) || !fake_resolve(from, size)) return INVALID_VALUE;
  return queue(s, (Work){.kind = DOWN, .device = from, .host = to, .size = size});
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t size, CUstream s) {
  if (value || !fake_resolve(to, size)) return INVALID_VALUE;
  return queue(s, (Work){.kind = CLEAR, .device = to, .size = size});
}
CUresult cuEventCreate(CUevent* event, unsigned int flags) {
  if (!fake_is_current()) return INVALID_CONTEXT;
  return *event = calloc(1, sizeof(**event)), ++counts[LIVE], flags != 2;
}
CUresult cuEventDestroy(CUevent event) { return free(event), --counts[LIVE], 0; }
CUresult cuEventRecord(CUevent event, CUstream s) {
  if (!is_stream(s) || s->capturing) return INVALID_VALUE;
  return event->stream = s, event->mark = s->done + s->list.count, 0;
}
CUresult cuEventSynchronize(CUevent event) {
  if (spoils_capture()) return CAPTURE_UNSUPPORTED;
  if (!event->stream || event->mark <= event->stream->done) return 0;
  if (!is_stream(event->stream)) return INVALID_VALUE;
  return run(event->stream, event->mark - event->stream->done);
}
CUresult cuStreamCreate(CUstream* s, unsigned int flags) {
  if (!fake_is_current()) return INVALID_CONTEXT;
  for (int i = 0; i < MANY; ++i)
    if (!streams[i]) return streams[i] = *s = calloc(1, sizeof(**s)), ++counts[LIVE], flags != 1;
  return OUT_OF_MEMORY;
}
CUresult cuStreamDestroy(CUstream s) {
  for (int i = 0; i < MANY; ++i)
    if (s && streams[i] == s) return clear(&s->list), free(s), streams[i] = NULL, --counts[LIVE], 0;
  return INVALID_VALUE;
}
CUresult cuStreamSynchronize(CUstream s) {
  if (!fake_is_current()) return INVALID_CONTEXT;
  if (!is_stream(s)) return INVALID_VALUE;
  if (spoils_capture()) return CAPTURE_UNSUPPORTED;
  ++counts[SYNCHRONIZATIONS];
  return run(s, s->list.count);
}
CUresult cuStreamBeginCapture(CUstream s, CUstreamCaptureMode mode) {
  if (!is_stream(s) || s->capturing || mode != 2) return INVALID_VALUE;  // relaxed: allocating is allowed
  s->capturing = calloc(1, sizeof(*s->capturing)), s->broken = 0;
  return ++counts[LIVE], 0;
}
CUresult cuStreamEndCapture(CUstream s, CUgraph* graph) {
  if (!is_stream(s) || !s->capturing) return INVALID_VALUE;
  *graph = s->capturing, s->capturing = NULL;
  if (!s->broken) return ++counts[CAPTURES], 0;
  clear(&(*graph)->list), free(*graph), *graph = NULL, --counts[LIVE];
  return CAPTURE_INVALIDATED;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long flags) {
  if (!graph || flags) return INVALID_VALUE;
  *exec = calloc(1, sizeof(**exec));
  for (int i = 0; i < graph->list.count; ++i) append(&(*exec)->list, graph->list.work[i]);
  return ++counts[LIVE], 0;
}
CUresult cuGraphLaunch(CUgraphExec exec, CUstream s) {
  if (!exec) return INVALID_VALUE;
  ++counts[LAUNCHES];
  for (int i = 0; i < exec->list.count; ++i) {
    const int status = queue(s, exec->list.work[i]);
    if (status) return status;
  }
  return 0;
}
CUresult cuGraphExecDestroy(CUgraphExec exec) { return clear(&exec->list), free(exec), --counts[LIVE], 0; }
CUresult cuGraphDestroy(CUgraph graph) { return clear(&graph->list), free(graph), --counts[LIVE], 0; }
