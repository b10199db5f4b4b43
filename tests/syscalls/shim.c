/* Counts the system calls by which a process changes the files below one folder; one of them can be made
   to kill the process, or to fail.

   Loaded with LD_PRELOAD, its functions stand before those of the C library. Each counts its call, lets
   the kernel do it (or not), and notes it in a log that syscalls/shim.py reads. An fsync is only noted, and
   not done: syscalls/disk.py is a model of what a disk keeps. It works on Linux only. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, KILL, KILL_HALF_WAY, FAIL, FAIL_FROM_HERE };

static struct {
    char folder[PATH_MAX]; /* empty: nothing is watched */
    size_t length;
    int log;       /* a descriptor */
    int with_data; /* note the bytes that are written, too */
    long point;    /* the number of the call that is acted on */
    int action;
    int error;
    int no_exchange; /* renameat2 says that it cannot exchange, as some file systems do */
} plan = {.log = -1};

static long calls;       /* so far */
static int full;         /* whether calls that take room fail from here on */
static long (*kernel)(long, ...);

static long real(long number, long a, long b, long c, long d, long e)
{
    if (!kernel)
        kernel = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    return kernel(number, a, b, c, d, e);
}

/* The absolute path of a path that is relative to a folder's descriptor. */
static void resolve(int at, const char *path, char *out)
{
    char link[64];
    ssize_t n = 0;
    if (!path) {
        out[0] = 0;
        return;
    }
    if (path[0] != '/') {
        snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
        n = readlink(link, out, PATH_MAX - 2);
        if (n < 0)
            n = 0;
        out[n++] = '/';
    }
    snprintf(out + n, PATH_MAX - n, "%s", path);
}

static void resolve_descriptor(int fd, char *out)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    out[n < 0 ? 0 : n] = 0;
}

static int watched(const char *path)
{
    return plan.length && !strncmp(path, plan.folder, plan.length)
        && (path[plan.length] == '/' || !path[plan.length]);
}

/* Write a line to the log, and after it `size` bytes of data. */
static void note(const char *kind, long result, const char *path, const char *other, long offset,
                 const void *data, size_t size)
{
    char line[2 * PATH_MAX + 128];
    if (plan.log < 0)
        return;
    if (!plan.with_data)
        size = 0;
    int n = snprintf(line, sizeof line, "%s\t%ld\t%s\t%s\t%ld\t%zu\n", kind, result, path, other,
                     offset, size);
    real(SYS_write, plan.log, (long)line, n, 0, 0);
    if (size)
        real(SYS_write, plan.log, (long)data, size, 0, 0);
}

/* Count a call. Returns 0: do all of it; 1: half of it; -1: none of it, and errno is set. Or the process
   ends here. */
static int begin(const char *kind, const char *path, const char *other, int takes_room)
{
    int due = calls++ == plan.point;
    if (due && plan.action == KILL) {
        note(kind, -EINTR, path, other, 0, NULL, 0);
        kill(getpid(), SIGKILL);
    }
    if (due && plan.action == FAIL_FROM_HERE) {
        full = 1;
        if (!strcmp(kind, "write"))
            return 1; /* a disk takes what it can, and the next write fails */
    } else if (due && plan.action == KILL_HALF_WAY)
        return 1;
    if ((due && (plan.action == FAIL || plan.action == FAIL_FROM_HERE)) || (full && takes_room)) {
        errno = plan.error;
        note(kind, -errno, path, other, 0, NULL, 0);
        errno = plan.error;
        return -1;
    }
    return 0;
}

static long end(const char *kind, long result, const char *path, const char *other, long offset)
{
    int error = errno;
    note(kind, result < 0 ? -error : result, path, other, offset, NULL, 0);
    errno = error;
    return result;
}

/* what Python calls */

void shim_arm(const char *folder, int log, int with_data, long point, int action, int error,
              int no_exchange)
{
    snprintf(plan.folder, sizeof plan.folder, "%s", folder);
    plan.length = strlen(plan.folder);
    plan.log = log;
    plan.with_data = with_data;
    plan.point = point;
    plan.action = action;
    plan.error = error;
    plan.no_exchange = no_exchange;
    calls = full = 0;
}

/* A line of the test's own in the log. */
void shim_mark(const char *text) { note("mark", 0, text, "", 0, NULL, 0); }

/* For ranks, which a launcher starts: SHIM="LOG POINT ACTION ERROR RANK FOLDER", a log for each rank. */
__attribute__((constructor)) static void arm_from_environment(void)
{
    const char *text = getenv("SHIM"), *rank = getenv("PMI_RANK");
    char log[PATH_MAX], path[PATH_MAX + 16], folder[PATH_MAX];
    long point;
    int action, error, wanted;
    if (!rank)
        rank = getenv("OMPI_COMM_WORLD_RANK");
    if (!text || !rank)
        return;
    if (sscanf(text, "%4095s %ld %d %d %d %4095[^\n]", log, &point, &action, &error, &wanted, folder) != 6)
        abort();
    snprintf(path, sizeof path, "%s.%s", log, rank);
    int fd = real(SYS_openat, AT_FDCWD, (long)path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600, 0);
    shim_arm(folder, fd, 0, atoi(rank) == wanted ? point : -1, action, error, 0);
}

/* files */

static int open_at(int at, const char *path, int flags, mode_t mode)
{
    char full_path[PATH_MAX];
    if (!(flags & (O_CREAT | O_TRUNC)) || !plan.length)
        return real(SYS_openat, at, (long)path, flags, mode, 0);
    resolve(at, path, full_path);
    if (!watched(full_path))
        return real(SYS_openat, at, (long)path, flags, mode, 0);
    if (begin("open", full_path, "", flags & O_CREAT) < 0)
        return -1;
    return end("open", real(SYS_openat, at, (long)path, flags, mode, 0), full_path, "", flags);
}

#define OPEN(name)                                                        \
    int name(const char *path, int flags, ...)                            \
    {                                                                     \
        va_list more;                                                     \
        va_start(more, flags);                                            \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0; \
        va_end(more);                                                     \
        return open_at(AT_FDCWD, path, flags, mode);                      \
    }
#define OPENAT(name)                                                      \
    int name(int at, const char *path, int flags, ...)                    \
    {                                                                     \
        va_list more;                                                     \
        va_start(more, flags);                                            \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0; \
        va_end(more);                                                     \
        return open_at(at, path, flags, mode);                            \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

/* write, pwrite and writev. A position below 0 stands for the file's own position. */
static ssize_t write_at(int fd, const void *data, size_t size, off_t position, const struct iovec *parts,
                        int count)
{
    char path[PATH_MAX];
    struct stat status;
    long number = parts ? SYS_writev : position < 0 ? SYS_write : SYS_pwrite64;
    long first = parts ? (long)parts : (long)data, second = parts ? count : (long)size;
    resolve_descriptor(fd, path);
    if (fd == plan.log || !watched(path))
        return real(number, fd, first, second, position, 0);
    int half = begin("write", path, "", 1);
    if (half < 0)
        return -1;
    if (position < 0) {
        int appends = (fcntl(fd, F_GETFL) & O_APPEND) && !fstat(fd, &status);
        position = appends ? status.st_size : lseek(fd, 0, SEEK_CUR);
    }
    if (half)
        second /= 2;
    ssize_t result = half && second == 0 ? 0 : real(number, fd, first, second, position, 0);
    if (half && plan.action == FAIL_FROM_HERE && result == 0) {
        errno = plan.error;
        result = -1;
    }
    int error = errno;
    note("write", result < 0 ? -error : result, path, parts ? "writev" : "", position, data,
         parts || result < 0 ? 0 : result);
    if (half && plan.action == KILL_HALF_WAY)
        kill(getpid(), SIGKILL);
    errno = error;
    return result;
}

ssize_t write(int fd, const void *data, size_t size)
{
    return plan.length ? write_at(fd, data, size, -1, NULL, 0) : real(SYS_write, fd, (long)data, size, 0, 0);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t position)
{
    return write_at(fd, data, size, position, NULL, 0);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t position)
{
    return write_at(fd, data, size, position, NULL, 0);
}
ssize_t writev(int fd, const struct iovec *parts, int count)
{
    return write_at(fd, NULL, 0, -1, parts, count);
}

/* A call on a descriptor. An fsync does not reach the kernel: see above. */
static int on_descriptor(const char *kind, int fd, long number, long argument, int takes_room)
{
    char path[PATH_MAX];
    if (plan.length) {
        resolve_descriptor(fd, path);
        if (watched(path)) {
            if (begin(kind, path, "", takes_room) < 0)
                return -1;
            return end(kind, number < 0 ? 0 : real(number, fd, argument, 0, 0, 0), path, "", argument);
        }
    }
    return real(number < 0 ? SYS_fsync : number, fd, argument, 0, 0, 0);
}

int fsync(int fd) { return on_descriptor("fsync", fd, -1, 0, 0); }
int fdatasync(int fd) { return on_descriptor("fsync", fd, -1, 0, 0); }
int ftruncate(int fd, off_t size) { return on_descriptor("ftruncate", fd, SYS_ftruncate, size, 0); }
int ftruncate64(int fd, off64_t size) { return on_descriptor("ftruncate", fd, SYS_ftruncate, size, 0); }

/* Network file systems report a full disk at close. The descriptor is closed all the same. */
int close(int fd)
{
    char path[PATH_MAX];
    if (plan.length && fd != plan.log && (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY) {
        resolve_descriptor(fd, path);
        if (watched(path)) {
            int failed = begin("close", path, "", 0);
            int error = errno;
            long result = real(SYS_close, fd, 0, 0, 0, 0);
            if (failed < 0) {
                errno = error;
                return -1;
            }
            return end("close", result, path, "", 0);
        }
    }
    return real(SYS_close, fd, 0, 0, 0, 0);
}

/* names */

/* A call on a path relative to a folder's descriptor, or on two of them. */
static int on_names(const char *kind, int at, const char *path, int to_at, const char *to, long number,
                    const long *arguments, long flags, int takes_room)
{
    char one[PATH_MAX], other[PATH_MAX] = "";
    const long *a = arguments;
    if (plan.length) {
        resolve(at, path, one);
        resolve(to_at, to, other);
        if (watched(one) || watched(other)) {
            if (begin(kind, one, other, takes_room) < 0)
                return -1;
            return end(kind, real(number, a[0], a[1], a[2], a[3], a[4]), one, other, flags);
        }
    }
    return real(number, a[0], a[1], a[2], a[3], a[4]);
}

int renameat2(int at, const char *path, int to_at, const char *to, unsigned flags)
{
    long arguments[] = {at, (long)path, to_at, (long)to, flags};
    if (flags && plan.no_exchange) {
        errno = EINVAL;
        return -1;
    }
    return on_names(flags & RENAME_EXCHANGE ? "exchange" : "rename", at, path, to_at, to, SYS_renameat2,
                    arguments, flags, 0);
}
int renameat(int at, const char *path, int to_at, const char *to) { return renameat2(at, path, to_at, to, 0); }
int rename(const char *path, const char *to) { return renameat2(AT_FDCWD, path, AT_FDCWD, to, 0); }

int unlinkat(int at, const char *path, int flags)
{
    long arguments[] = {at, (long)path, flags, 0, 0};
    return on_names(flags & AT_REMOVEDIR ? "rmdir" : "unlink", at, path, 0, NULL, SYS_unlinkat, arguments,
                    flags, 0);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int at, const char *path, mode_t mode)
{
    long arguments[] = {at, (long)path, mode, 0, 0};
    return on_names("mkdir", at, path, 0, NULL, SYS_mkdirat, arguments, 0, 1);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int linkat(int at, const char *path, int to_at, const char *to, int flags)
{
    long arguments[] = {at, (long)path, to_at, (long)to, flags};
    return on_names("link", at, path, to_at, to, SYS_linkat, arguments, flags, 1);
}
int link(const char *path, const char *to) { return linkat(AT_FDCWD, path, AT_FDCWD, to, 0); }

int symlinkat(const char *content, int at, const char *path)
{
    long arguments[] = {(long)content, at, (long)path, 0, 0};
    return on_names("symlink", at, path, 0, NULL, SYS_symlinkat, arguments, 0, 1);
}
int symlink(const char *content, const char *path) { return symlinkat(content, AT_FDCWD, path); }

static int truncate_path(const char *path, off_t size)
{
    long arguments[] = {(long)path, size, 0, 0, 0};
    return on_names("truncate", AT_FDCWD, path, 0, NULL, SYS_truncate, arguments, size, 0);
}
int truncate(const char *path, off_t size) { return truncate_path(path, size); }
int truncate64(const char *path, off64_t size) { return truncate_path(path, size); }

/* A program may ask for renameat2 by its number. */
long syscall(long number, ...)
{
    va_list more;
    va_start(more, number);
    long a = va_arg(more, long), b = va_arg(more, long), c = va_arg(more, long), d = va_arg(more, long),
         e = va_arg(more, long), f = va_arg(more, long);
    va_end(more);
    if (number == SYS_renameat2)
        return renameat2(a, (const char *)b, c, (const char *)d, e);
    if (!kernel)
        kernel = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    return kernel(number, a, b, c, d, e, f);
}
