/* A CUDA runtime without a GPU: one device, whose memory the host cannot read, and kernels that do nothing.

   What ONNX Runtime copies to or from the device really is copied, through a second mapping. The symbols that are
   not here are made by cuda_stub.py, and return 0, which is success. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define DEVICE_BYTES (1ul << 36)
#define VERSION 13000

static char *device, *behind;
static size_t used;
static uintptr_t handles;

static void *reachable(const void *p) {
  const char *address = p;
  return device && address >= device && address < device + DEVICE_BYTES ? behind + (address - device) : (void *)p;
}

static int handle(void **made) {
  *made = (void *)(handles += 16);
  return 0;
}

int cudaGetDeviceCount(int *count) { return *count = 1, 0; }
int cudaGetDevice(int *number) { return *number = 0, 0; }
int cudaDriverGetVersion(int *version) { return *version = VERSION, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = VERSION, 0; }
int cudaMemGetInfo(size_t *left, size_t *total) { return *left = *total = DEVICE_BYTES, 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int number) { return *value = 1, 0; }
int cudaStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }

/* Offsets in CUDA 13's cudaDeviceProp of 1,008 bytes: a Hopper GPU. */
int cudaGetDeviceProperties(char *properties, int number) {
  memset(properties, 0, 1008);
  strcpy(properties, "stub");
  memcpy(properties + 288, &(size_t){DEVICE_BYTES}, sizeof(size_t)); /* totalGlobalMem */
  memcpy(properties + 308, &(int){32}, sizeof(int));                 /* warpSize */
  memcpy(properties + 360, &(int){9}, sizeof(int));                  /* major */
  memcpy(properties + 384, &(int){132}, sizeof(int));                /* multiProcessorCount */
  return 0;
}

int cudaMalloc(void **made, size_t bytes) {
  if (!device) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    device = mmap(0, DEVICE_BYTES, PROT_NONE, flags, -1, 0);
    behind = mmap(0, DEVICE_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
  }
  *made = device + used;
  used += (bytes + 511) / 256 * 256;
  return used > DEVICE_BYTES ? 2 : 0;
}
int cudaHostAlloc(void **made, size_t bytes, unsigned flags) { return (*made = malloc(bytes)) ? 0 : 2; }
int cudaMallocHost(void **made, size_t bytes) { return (*made = malloc(bytes)) ? 0 : 2; }
int cudaFreeHost(void *p) { return free(p), 0; }

int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
  return memcpy(reachable(to), reachable(from), bytes), 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
  return cudaMemcpy(to, from, bytes, kind);
}
int cudaMemset(void *to, int value, size_t bytes) { return memset(reachable(to), value, bytes), 0; }
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) { return cudaMemset(to, value, bytes); }

int cudaStreamCreate(void **stream) { return handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return handle(stream); }
int cudaEventCreate(void **event) { return handle(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return handle(event); }
int cublasCreate_v2(void **made) { return handle(made); }
int cublasLtCreate(void **made) { return handle(made); }
void *__cudaRegisterFatBinary(void *binary) { return &handles; }
