/* A libcuda.so.1 without a GPU behind it, so that the real bindings can be driven on any machine.
 *
 * It has one device of compute capability 8.7 and a driver for CUDA 12.6, notes every call that matters in the file
 * $STUB_LOG, and reads kernel arguments as the driver does: through pointers, as many bytes as the digits of
 * $STUB_SIZES say. cuInit answers $STUB_INIT. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CONTEXT ((void *)0xC0)
#define MODULE ((void *)0xD0)
#define FUNCTION ((void *)0xF0)

static int note(const char *line) {
    FILE *log = fopen(getenv("STUB_LOG"), "a");
    fprintf(log, "%s\n", line);
    fclose(log);
    return 0;
}

static int note_of(const char *line, const void *got, const void *expected) {
    return note(got == expected ? line : "a handle that the driver did not give");
}

int cuInit(unsigned flags) { return atoi(getenv("STUB_INIT")); }

int cuDriverGetVersion(int *version) {
    *version = 12060;
    return 0;
}

int cuDeviceGetCount(int *count) {
    *count = 1;
    return 0;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 7 : -1;
    return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = CONTEXT;
    return note("retain");
}

int cuDevicePrimaryCtxRelease_v2(int device) { return note("release"); }

int cuCtxPushCurrent_v2(void *context) { return note_of("push", context, CONTEXT); }

int cuCtxPopCurrent_v2(void **context) {
    *context = CONTEXT;
    return note("pop");
}

int cuModuleLoadData(void **module, const void *image) {
    *module = MODULE;
    return note(memcmp(image, "\x7f" "ELF", 4) ? "load something else" : "load an ELF");
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    char line[256];
    *function = FUNCTION;
    snprintf(line, sizeof line, "function %s", name);
    return note_of(line, module, MODULE);
}

int cuModuleUnload(void *module) { return note_of("unload", module, MODULE); }

int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **parameters, void **extra) {
    char line[2048];
    int at = sprintf(line, "launch (%u %u %u) (%u %u %u) %u %lx", grid_x, grid_y, grid_z, block_x, block_y, block_z,
                     shared, (unsigned long)stream);
    for (const char *size = getenv("STUB_SIZES"); *size; size++) {
        uint64_t value = 0;
        memcpy(&value, *parameters++, *size - '0');
        at += sprintf(line + at, " %lx", (unsigned long)value);
    }
    return extra ? 1 : note_of(line, function, FUNCTION);
}

/* The bindings look every function up through the driver, by the name without its version. */
static int find(const char *name, void **address) {
    char versioned[256];
    void *self = dlopen("libcuda.so.1", RTLD_LAZY);
    snprintf(versioned, sizeof versioned, "%s_v2", name);
    *address = dlsym(self, versioned);
    if (!*address) *address = dlsym(self, name);
    return *address ? 0 : 500;
}

int cuGetProcAddress(const char *name, void **address, int version, uint64_t flags) { return find(name, address); }

int cuGetProcAddress_v2(const char *name, void **address, int version, uint64_t flags, int *status) {
    return find(name, address);
}
