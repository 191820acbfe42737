/* Preloaded into a process, makes writes, syncs and truncations of database files fail.
 *
 * Only files whose name contains ".db" are touched: the database, its WAL, its -shm, its anchor, its lock. They are
 * counted, and `fault_arm` says which one fails, how, and whether those after it do so too. Without it, and without
 * DSPEX_FAULT_AT in the environment, everything works.
 *
 * Modes: "eio" and "enospc" fail with that error; "short" writes half of the bytes, and the next write gets ENOSPC.
 * While the file named by DSPEX_FAULT_FULL_WHILE exists, no file can grow (ENOSPC), as on a disk without room.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum action { PASS, FAIL, HALF };

static atomic_long seen;
static atomic_int cut_short;
static long fail_at;
static int fail_with = EIO;
static int halves;
static int goes_on;
static const char *full_while;

static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
static int (*real_fsync)(int);
static int (*real_fdatasync)(int);
static int (*real_ftruncate)(int, off_t);

void fault_arm(long at, const char *mode, int on)
{
    seen = 0;
    cut_short = 0;
    halves = strcmp(mode, "short") == 0;
    fail_with = strcmp(mode, "eio") == 0 ? EIO : ENOSPC;
    goes_on = on;
    fail_at = at;
}

long fault_seen(void)
{
    return seen;
}

__attribute__((constructor)) static void load(void)
{
    const char *at = getenv("DSPEX_FAULT_AT");
    const char *mode = getenv("DSPEX_FAULT_MODE");
    const char *on = getenv("DSPEX_FAULT_GOES_ON");

    real_write = dlsym(RTLD_NEXT, "write");
    real_pwrite = dlsym(RTLD_NEXT, "pwrite64");
    real_fsync = dlsym(RTLD_NEXT, "fsync");
    real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
    real_ftruncate = dlsym(RTLD_NEXT, "ftruncate64");
    full_while = getenv("DSPEX_FAULT_FULL_WHILE");
    if (at != NULL)
        fault_arm(atol(at), mode != NULL ? mode : "eio", on != NULL);
}

static int is_database(int fd)
{
    char link[64], path[4096];
    ssize_t length;
    const char *name;

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    if (length <= 0)
        return 0;
    path[length] = 0;
    name = strrchr(path, '/');
    return name != NULL && strstr(name, ".db") != NULL;
}

static enum action next_action(int fd, int is_write)
{
    long number;

    if (fail_at == 0 && full_while == NULL)
        return PASS;
    if (!is_database(fd))
        return PASS;
    number = ++seen;
    if (is_write && atomic_exchange(&cut_short, 0))
        return FAIL;
    if (fail_at == 0 || number < fail_at || (number > fail_at && !goes_on))
        return PASS;
    if (halves && is_write) {
        cut_short = 1;
        return HALF;
    }
    return FAIL;
}

/* Whether there is no room for bytes up to `end`. */
static int is_full(int fd, off_t end)
{
    struct stat status;

    if (full_while == NULL || access(full_while, F_OK) != 0 || !is_database(fd))
        return 0;
    return fstat(fd, &status) == 0 && end > status.st_size;
}

static int failed(int error)
{
    errno = error;
    return -1;
}

ssize_t write(int fd, const void *buffer, size_t count)
{
    if (full_while != NULL && is_full(fd, lseek(fd, 0, SEEK_CUR) + (off_t)count))
        return failed(ENOSPC);
    switch (next_action(fd, 1)) {
    case FAIL:
        return failed(fail_with);
    case HALF:
        return real_write(fd, buffer, count / 2);
    default:
        return real_write(fd, buffer, count);
    }
}

ssize_t pwrite64(int fd, const void *buffer, size_t count, off_t offset)
{
    if (is_full(fd, offset + (off_t)count))
        return failed(ENOSPC);
    switch (next_action(fd, 1)) {
    case FAIL:
        return failed(fail_with);
    case HALF:
        return real_pwrite(fd, buffer, count / 2, offset);
    default:
        return real_pwrite(fd, buffer, count, offset);
    }
}

ssize_t pwrite(int fd, const void *buffer, size_t count, off_t offset)
{
    return pwrite64(fd, buffer, count, offset);
}

int fsync(int fd)
{
    return next_action(fd, 0) == PASS ? real_fsync(fd) : failed(fail_with);
}

int fdatasync(int fd)
{
    return next_action(fd, 0) == PASS ? real_fdatasync(fd) : failed(fail_with);
}

int ftruncate64(int fd, off_t length)
{
    return next_action(fd, 0) == PASS ? real_ftruncate(fd, length) : failed(fail_with);
}

int ftruncate(int fd, off_t length)
{
    return ftruncate64(fd, length);
}
