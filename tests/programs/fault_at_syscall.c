/* A shim for LD_PRELOAD: the n-th operation that changes files below a folder goes wrong.
 *
 * Operations are calls that open a file for writing, write, force to disk, rename, make or remove files and folders,
 * through the C library's functions: Python's and Rust's own. Reading is never touched. What goes through stdio's
 * buffers (fopen) is not seen; a caller compares the bytes counted here with the files' sizes to know that nothing is.
 *
 *   fault_arm(folder, fault, n)   from now on; n counts from 1, n = 0 only counts; or the environment's
 *                                 FAULT_FOLDER, FAULT_KIND and FAULT_AT when the process begins
 *   fault_count(), fault_log()    operations since then; one line of each: kind, path, bytes, in this order, by tabs
 */
#define _GNU_SOURCE
#undef _FILE_OFFSET_BITS
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum fault { COUNT = 0, KILL_BEFORE = 1, KILL_MIDDLE = 2, DISK_FULL = 3, EIO_ONCE = 4 };
enum answer { GO_ON, FAIL, HALF, HALF_AND_KILL };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char folder[PATH_MAX] = "";
static int kind_of_fault = COUNT;
static long at = 0, count = 0;
static char records[1 << 22];
static size_t recorded = 0;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) {
        fprintf(stderr, "fault_at_syscall: the C library has no %s\n", name);
        abort();
    }
    return found;
}

void fault_arm(const char *below, int fault, long number) {
    pthread_mutex_lock(&mutex);
    snprintf(folder, sizeof folder, "%s", below);
    kind_of_fault = fault, at = number, count = 0, recorded = 0, records[0] = 0;
    pthread_mutex_unlock(&mutex);
}

long fault_count(void) { return count; }
const char *fault_log(void) { return records; }

__attribute__((constructor)) static void arm_from_environment(void) {
    const char *below = getenv("FAULT_FOLDER"), *fault = getenv("FAULT_KIND"), *number = getenv("FAULT_AT");
    if (below) fault_arm(below, fault ? atoi(fault) : COUNT, number ? atol(number) : 0);
}

static int of_descriptor(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0;
}

static void resolve(int base, const char *name, char *path) {
    char start[PATH_MAX];
    if (name[0] == '/') snprintf(path, PATH_MAX, "%s", name);
    else if (base == AT_FDCWD ? getcwd(start, sizeof start) != NULL : of_descriptor(base, start))
        snprintf(path, PATH_MAX, "%.*s/%s", PATH_MAX / 2, start, name);
    else path[0] = 0;
}

static int makes_room_needed(const char *kind) {
    return !strcmp(kind, "open") || !strcmp(kind, "write") || !strcmp(kind, "mkdir") || !strcmp(kind, "resize");
}

/* What happens to an operation on ``path``; FAIL has set errno. */
static enum answer decide(const char *kind, const char *path, size_t bytes) {
    size_t length = strlen(folder);
    if (!length || strncmp(path, folder, length) || (path[length] && path[length] != '/')) return GO_ON;
    enum answer answer = GO_ON;
    pthread_mutex_lock(&mutex);
    count++;
    size_t room = sizeof records - recorded;
    int written = snprintf(records + recorded, room, "%s\t%s\t%zu\n", kind, path, bytes);
    if (written > 0 && (size_t)written < room) recorded += written;
    int now = at && count == at, later = at && count > at, writes = !strcmp(kind, "write") && bytes > 1;
    if (now && kind_of_fault == KILL_BEFORE) kill(getpid(), SIGKILL);
    if (now && kind_of_fault == KILL_MIDDLE) answer = writes ? HALF_AND_KILL : GO_ON;
    if (now && kind_of_fault == EIO_ONCE) answer = FAIL, errno = EIO;
    if ((now || later) && kind_of_fault == DISK_FULL && makes_room_needed(kind)) {
        answer = now && writes ? HALF : FAIL;
        if (answer == FAIL) errno = ENOSPC;
    }
    pthread_mutex_unlock(&mutex);
    return answer;
}

static enum answer decide_at(const char *kind, int base, const char *name) {
    char path[PATH_MAX];
    resolve(base, name, path);
    return decide(kind, path, 0);
}

static enum answer decide_of(const char *kind, int descriptor, size_t bytes) {
    char path[PATH_MAX];
    if (!folder[0] || !of_descriptor(descriptor, path)) return GO_ON;
    return decide(kind, path, bytes);
}

static int opens_for_writing(int flags) {
    return (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
}

#define MODE_OF(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        MODE_OF(flags) \
        if (opens_for_writing(flags) && decide_at("open", AT_FDCWD, path) == FAIL) return -1; \
        return ((int (*)(const char *, int, ...))real(#name))(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int base, const char *path, int flags, ...) { \
        MODE_OF(flags) \
        if (opens_for_writing(flags) && decide_at("open", base, path) == FAIL) return -1; \
        return ((int (*)(int, const char *, int, ...))real(#name))(base, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define CREAT(name) \
    int name(const char *path, mode_t mode) { \
        if (decide_at("open", AT_FDCWD, path) == FAIL) return -1; \
        return REAL(name)(path, mode); \
    }
CREAT(creat)
CREAT(creat64)

static void end_here(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* ``call`` uses ``size``, which is halved for a half. */
#define WRITE(descriptor, total, call) \
    size_t size = (total); \
    enum answer answer = decide_of("write", descriptor, size); \
    if (answer == FAIL) return -1; \
    if (answer == HALF || answer == HALF_AND_KILL) size /= 2; \
    ssize_t done = call; \
    if (answer == HALF_AND_KILL) end_here(); \
    return done;

ssize_t write(int descriptor, const void *data, size_t bytes) {
    WRITE(descriptor, bytes, REAL(write)(descriptor, data, size))
}
ssize_t pwrite(int descriptor, const void *data, size_t bytes, off_t offset) {
    WRITE(descriptor, bytes, REAL(pwrite)(descriptor, data, size, offset))
}
ssize_t pwrite64(int descriptor, const void *data, size_t bytes, off64_t offset) {
    WRITE(descriptor, bytes, REAL(pwrite64)(descriptor, data, size, offset))
}

static size_t total_of(const struct iovec *parts, int number) {
    size_t total = 0;
    for (int part = 0; part < number; part++) total += parts[part].iov_len;
    return total;
}

/* A half of a vector is its first part's half: callers go on after a short write. */
ssize_t writev(int descriptor, const struct iovec *parts, int number) {
    size_t total = total_of(parts, number);
    WRITE(descriptor, total,
          size == total ? REAL(writev)(descriptor, parts, number)
                        : REAL(write)(descriptor, parts[0].iov_base, (parts[0].iov_len + 1) / 2))
}

ssize_t sendfile64(int to, int from, off64_t *offset, size_t bytes) {
    WRITE(to, bytes, ((ssize_t(*)(int, int, off64_t *, size_t))real("sendfile64"))(to, from, offset, size))
}
ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t bytes, unsigned flags) {
    WRITE(to, bytes, REAL(copy_file_range)(from, from_at, to, to_at, size, flags))
}

#define ON_DESCRIPTOR(kind, name, parameters, descriptor, ...) \
    int name parameters { \
        if (decide_of(kind, descriptor, 0) == FAIL) return -1; \
        return REAL(name)(__VA_ARGS__); \
    }
ON_DESCRIPTOR("fsync", fsync, (int descriptor), descriptor, descriptor)
ON_DESCRIPTOR("fsync", fdatasync, (int descriptor), descriptor, descriptor)
ON_DESCRIPTOR("resize", ftruncate, (int descriptor, off_t size), descriptor, descriptor, size)
ON_DESCRIPTOR("resize", ftruncate64, (int descriptor, off64_t size), descriptor, descriptor, size)
ON_DESCRIPTOR("resize", fallocate, (int descriptor, int mode, off_t from, off_t size), descriptor, descriptor, mode,
              from, size)
ON_DESCRIPTOR("resize", fallocate64, (int descriptor, int mode, off64_t from, off64_t size), descriptor, descriptor,
              mode, from, size)

#define RESERVE(name, number) \
    int name(int descriptor, number from, number size) { \
        if (decide_of("resize", descriptor, 0) == FAIL) return errno; /* this one returns its error */ \
        return REAL(name)(descriptor, from, size); \
    }
RESERVE(posix_fallocate, off_t)
RESERVE(posix_fallocate64, off64_t)

#define ON_PATH(kind, name, parameters, base, path, ...) \
    int name parameters { \
        if (decide_at(kind, base, path) == FAIL) return -1; \
        return REAL(name)(__VA_ARGS__); \
    }
ON_PATH("rename", rename, (const char *old, const char *new), AT_FDCWD, new, old, new)
ON_PATH("rename", renameat, (int from, const char *old, int to, const char *new), to, new, from, old, to, new)
ON_PATH("rename", renameat2, (int from, const char *old, int to, const char *new, unsigned flags), to, new, from, old,
        to, new, flags)
ON_PATH("mkdir", mkdir, (const char *path, mode_t mode), AT_FDCWD, path, path, mode)
ON_PATH("mkdir", mkdirat, (int base, const char *path, mode_t mode), base, path, base, path, mode)
ON_PATH("remove", unlink, (const char *path), AT_FDCWD, path, path)
ON_PATH("remove", rmdir, (const char *path), AT_FDCWD, path, path)
ON_PATH("remove", unlinkat, (int base, const char *path, int flags), base, path, base, path, flags)
ON_PATH("resize", truncate, (const char *path, off_t size), AT_FDCWD, path, path, size)
