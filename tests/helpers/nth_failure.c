/* Makes the n-th call of the C library in one folder fail. Calls that change something and calls that open for reading are counted
 * apart. Loaded with LD_PRELOAD.
 *
 * nth_watch(folder) chooses the folder, by its real path. nth_arm(changes, n, code, stays) starts the count again, in this process and
 * in those that it forks: with changes 1, the n-th call that changes something fails with errno code; with changes 0, the n-th call that
 * opens for reading. With stays 1, every later call that needs room fails, too, as on a full disk. nth_count(changes) gives the number
 * of calls, and nth_failed() the call that failed. A write that fails has written half of its bytes. With code 0 it says so, as a
 * short write does; with EINTR it says that a signal came. Only writes can end like this: other calls then do not fail.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST (2 * PATH_MAX)

static struct {
    char folder[PATH_MAX], failed[MOST + 64];
    int changes, code, stays;
    long nth, count[2];
} *shared;

__attribute__((constructor)) static void begin(void) {
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void nth_watch(const char *folder) { snprintf(shared->folder, PATH_MAX, "%s", folder); }

void nth_arm(int changes, long n, int code, int stays) {
    shared->changes = changes, shared->code = code, shared->stays = stays, shared->failed[0] = 0;
    shared->count[0] = shared->count[1] = 0, shared->nth = n;
}

long nth_count(int changes) { return shared->count[changes]; }

const char *nth_failed(void) { return shared->failed; }

#define REAL(name) \
    static typeof(name) *real; \
    if (!real) real = (typeof(name) *)dlsym(RTLD_NEXT, #name)

static int is_watched(const char *path) {
    size_t length = strlen(shared->folder);
    return length && !strncmp(path, shared->folder, length) && (path[length] == '/' || !path[length]);
}

static const char *of_handle(int handle, char *found) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, found, PATH_MAX - 1);
    found[length < 0 ? 0 : length] = 0;
    return found;
}

static const char *absolute(int folder, const char *path, char *found) {
    char base[PATH_MAX] = "";
    if (path[0] == '/') snprintf(found, MOST, "%s", path);
    else {
        if (folder != AT_FDCWD) of_handle(folder, base);
        else if (!getcwd(base, sizeof base)) base[0] = 0;
        snprintf(found, MOST, "%s/%s", base, path);
    }
    return found;
}

enum { READS, CHANGES };
enum { FREES, NEEDS_ROOM };

static int can_end_early(const char *call) { return !strcmp(call, "write") || !strcmp(call, "pwrite") || !strcmp(call, "pwrite64"); }

/* Whether this call on this path must fail. */
static int fails(const char *call, const char *path, int changes, int needs_room) {
    if (!is_watched(path)) return 0;
    long number = __atomic_add_fetch(&shared->count[changes], 1, __ATOMIC_SEQ_CST);
    if (!shared->nth || changes != shared->changes || number < shared->nth || (number > shared->nth && !(shared->stays && needs_room))) return 0;
    if ((!shared->code || shared->code == EINTR) && !can_end_early(call)) return 0;
    if (number == shared->nth) snprintf(shared->failed, sizeof shared->failed, "%s %s", call, path);
    errno = shared->code;
    return 1;
}

static int fails_at(const char *call, int folder, const char *path, int changes, int needs_room) {
    char found[MOST];
    return shared && shared->folder[0] && path && fails(call, absolute(folder, path, found), changes, needs_room);
}

static int fails_to_open(const char *call, int folder, const char *path, int flags) {
    int changes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
    return fails_at(call, folder, path, changes, !!(flags & O_CREAT));
}

static int fails_on(const char *call, int handle) {
    int before = errno;
    char found[PATH_MAX];
    if (!shared || !shared->folder[0]) return 0;
    of_handle(handle, found);
    errno = before;
    return fails(call, found, CHANGES, NEEDS_ROOM);
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        return fails_to_open(#name, AT_FDCWD, path, flags) ? -1 : real(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        return fails_to_open(#name, folder, path, flags) ? -1 : real(folder, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

static int flags_of(const char *mode) {
    return mode[0] != 'r' ? O_WRONLY | O_CREAT : strchr(mode, '+') ? O_RDWR : O_RDONLY;
}

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        return fails_to_open(#name, AT_FDCWD, path, flags_of(mode)) ? NULL : real(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int handle, const void *bytes, size_t n) {
    REAL(write);
    if (!fails_on("write", handle)) return real(handle, bytes, n);
    ssize_t half = real(handle, bytes, n / 2);
    errno = shared->code;
    return shared->code ? -1 : half;
}

#define PWRITE(name) \
    ssize_t name(int handle, const void *bytes, size_t n, off_t at) { \
        REAL(name); \
        if (!fails_on(#name, handle)) return real(handle, bytes, n, at); \
        ssize_t half = real(handle, bytes, n / 2, at); \
        errno = shared->code; \
        return shared->code ? -1 : half; \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int handle, const struct iovec *parts, int n) {
    REAL(writev);
    return fails_on("writev", handle) ? -1 : real(handle, parts, n);
}

#define PWRITEV(name) \
    ssize_t name(int handle, const struct iovec *parts, int n, off_t at) { \
        REAL(name); \
        return fails_on(#name, handle) ? -1 : real(handle, parts, n, at); \
    }
PWRITEV(pwritev)
PWRITEV(pwritev64)

#define ON_HANDLE(name) \
    int name(int handle) { \
        REAL(name); \
        return fails_on(#name, handle) ? -1 : real(handle); \
    }
ON_HANDLE(fsync)
ON_HANDLE(fdatasync)

#define FTRUNCATE(name) \
    int name(int handle, off_t size) { \
        REAL(name); \
        return fails_on(#name, handle) ? -1 : real(handle, size); \
    }
FTRUNCATE(ftruncate)
FTRUNCATE(ftruncate64)

#define TRUNCATE(name) \
    int name(const char *path, off_t size) { \
        REAL(name); \
        return fails_at(#name, AT_FDCWD, path, CHANGES, FREES) ? -1 : real(path, size); \
    }
TRUNCATE(truncate)
TRUNCATE(truncate64)

int fallocate(int handle, int mode, off_t at, off_t size) {
    REAL(fallocate);
    return fails_on("fallocate", handle) ? -1 : real(handle, mode, at, size);
}

#define TWO_PATHS(name) \
    int name(const char *old, const char *new) { \
        REAL(name); \
        return fails_at(#name, AT_FDCWD, new, CHANGES, NEEDS_ROOM) ? -1 : real(old, new); \
    }
TWO_PATHS(rename)
TWO_PATHS(link)

int renameat(int from, const char *old, int to, const char *new) {
    REAL(renameat);
    return fails_at("renameat", to, new, CHANGES, NEEDS_ROOM) ? -1 : real(from, old, to, new);
}

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    REAL(renameat2);
    return fails_at("renameat2", to, new, CHANGES, NEEDS_ROOM) ? -1 : real(from, old, to, new, flags);
}

int linkat(int from, const char *old, int to, const char *new, int flags) {
    REAL(linkat);
    return fails_at("linkat", to, new, CHANGES, NEEDS_ROOM) ? -1 : real(from, old, to, new, flags);
}

#define ON_PATH(name) \
    int name(const char *path) { \
        REAL(name); \
        return fails_at(#name, AT_FDCWD, path, CHANGES, FREES) ? -1 : real(path); \
    }
ON_PATH(unlink)
ON_PATH(rmdir)

int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    return fails_at("unlinkat", folder, path, CHANGES, FREES) ? -1 : real(folder, path, flags);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return fails_at("mkdir", AT_FDCWD, path, CHANGES, NEEDS_ROOM) ? -1 : real(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat);
    return fails_at("mkdirat", folder, path, CHANGES, NEEDS_ROOM) ? -1 : real(folder, path, mode);
}
