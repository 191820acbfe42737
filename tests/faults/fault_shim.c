/* A preloaded library that makes operations on database files fail.
 *
 * It affects only files with ".db" in the name: the database, its WAL, its -shm, its anchor, its lock, backups.
 * It counts operations of the chosen kinds; `fault_arm` sets which one fails, how, and whether later ones fail, too.
 * Without `fault_arm`, and without DSPEX_FAULT_AT in the environment, everything works.
 *
 * Kinds: open, read, write, sync, truncate, lock, unlink, rename (and link); several have spaces between them.
 * Modes: "eio", "enospc", "enolck" and "emfile" fail with that error; "short" does half of a read or a write. After half
 * of a write the next one gets ENOSPC; a read gets on however often that happens (nothing at all is a file's end).
 * While the file named by DSPEX_FAULT_FULL_WHILE exists, no file can grow (ENOSPC), as on a disk without room.
 *
 * SQLite retries for ten seconds to get a lock, counting its sleeps. They are shorter here, so that an unavailable lock
 * costs only half a second.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum kind { OPEN, READ, WRITE, SYNC, TRUNCATE, LOCK, UNLINK, RENAME, KINDS };
enum action { PASS, FAIL, HALF };

static const char *const kind_names[KINDS] = {"open", "read", "write", "sync", "truncate", "lock", "unlink", "rename"};
static const struct {
    const char *name;
    int error;
} modes[] = {{"eio", EIO}, {"enospc", ENOSPC}, {"enolck", ENOLCK}, {"emfile", EMFILE}, {"short", ENOSPC}};

static atomic_long seen;
static atomic_long seen_of[KINDS];
static atomic_int cut_short;
static long fail_at;
static int counted[KINDS];
static int fail_with = EIO;
static int halves;
static int goes_on;
static const char *full_while;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void fault_arm(const char *kinds, long at, const char *mode, int on)
{
    size_t i;

    for (i = 0; i < KINDS; i++) {
        counted[i] = strstr(kinds, kind_names[i]) != NULL;
        seen_of[i] = 0;
    }
    for (i = 0; i < sizeof modes / sizeof *modes; i++)
        if (strcmp(mode, modes[i].name) == 0)
            fail_with = modes[i].error;
    seen = 0;
    cut_short = 0;
    halves = strcmp(mode, "short") == 0;
    goes_on = on;
    fail_at = at;
}

/* The number of operations of a kind since then. */
long fault_seen(const char *kind)
{
    size_t i;

    for (i = 0; i < KINDS; i++)
        if (strcmp(kind, kind_names[i]) == 0)
            return seen_of[i];
    return -1;
}

__attribute__((constructor)) static void load(void)
{
    const char *at = getenv("DSPEX_FAULT_AT");
    const char *mode = getenv("DSPEX_FAULT_MODE");
    const char *kinds = getenv("DSPEX_FAULT_KINDS");

    full_while = getenv("DSPEX_FAULT_FULL_WHILE");
    if (at != NULL)
        fault_arm(kinds != NULL ? kinds : "write sync truncate", atol(at), mode != NULL ? mode : "eio",
                  getenv("DSPEX_FAULT_GOES_ON") != NULL);
}

static int is_database_name(const char *path)
{
    const char *name = strrchr(path, '/');

    return strstr(name != NULL ? name : path, ".db") != NULL;
}

static int is_database(int fd)
{
    char link[64], path[4096];
    ssize_t length;

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    if (length <= 0)
        return 0;
    path[length] = 0;
    return path[0] == '/' && is_database_name(path);
}

static enum action count(enum kind kind)
{
    long number = ++seen;

    seen_of[kind]++;
    if (kind == WRITE && atomic_exchange(&cut_short, 0))
        return FAIL;
    if (number < fail_at || (number > fail_at && !goes_on))
        return PASS;
    if (halves && (kind == WRITE || kind == READ)) {
        cut_short = kind == WRITE;
        return HALF;
    }
    return FAIL;
}

static enum action next_action(enum kind kind, int fd)
{
    return fail_at != 0 && counted[kind] && is_database(fd) ? count(kind) : PASS;
}

static int fails(enum kind kind, const char *path)
{
    if (fail_at == 0 || !counted[kind] || !is_database_name(path) || count(kind) == PASS)
        return 0;
    errno = fail_with;
    return 1;
}

/* Whether there is no space for bytes up to `end`. */
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

#define OPEN_FUNCTION(name, parameters, arguments) \
    int name parameters \
    { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        return fails(OPEN, path) ? -1 : REAL(name) arguments; \
    }
OPEN_FUNCTION(open, (const char *path, int flags, ...), (path, flags, mode))
OPEN_FUNCTION(open64, (const char *path, int flags, ...), (path, flags, mode))
OPEN_FUNCTION(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode))
OPEN_FUNCTION(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode))

/* A read or a write: complete, half, or none of it. */
#define TRANSFER(kind, call, half) \
    switch (next_action(kind, fd)) { \
    case FAIL: \
        return failed(fail_with); \
    case HALF: \
        return half; \
    default: \
        return call; \
    }

ssize_t read(int fd, void *buffer, size_t size)
{
    TRANSFER(READ, REAL(read)(fd, buffer, size), REAL(read)(fd, buffer, (size + 1) / 2))
}

ssize_t pread(int fd, void *buffer, size_t size, off_t offset)
{
    TRANSFER(READ, REAL(pread)(fd, buffer, size, offset), REAL(pread)(fd, buffer, (size + 1) / 2, offset))
}

ssize_t pread64(int fd, void *buffer, size_t size, off_t offset)
{
    TRANSFER(READ, REAL(pread64)(fd, buffer, size, offset), REAL(pread64)(fd, buffer, (size + 1) / 2, offset))
}

ssize_t write(int fd, const void *buffer, size_t size)
{
    if (full_while != NULL && is_full(fd, lseek(fd, 0, SEEK_CUR) + (off_t)size))
        return failed(ENOSPC);
    TRANSFER(WRITE, REAL(write)(fd, buffer, size), REAL(write)(fd, buffer, size / 2))
}

ssize_t pwrite64(int fd, const void *buffer, size_t size, off_t offset)
{
    if (is_full(fd, offset + (off_t)size))
        return failed(ENOSPC);
    TRANSFER(WRITE, REAL(pwrite64)(fd, buffer, size, offset), REAL(pwrite64)(fd, buffer, size / 2, offset))
}

ssize_t pwrite(int fd, const void *buffer, size_t size, off_t offset)
{
    return pwrite64(fd, buffer, size, offset);
}

int fsync(int fd)
{
    return next_action(SYNC, fd) == PASS ? REAL(fsync)(fd) : failed(fail_with);
}

int fdatasync(int fd)
{
    return next_action(SYNC, fd) == PASS ? REAL(fdatasync)(fd) : failed(fail_with);
}

int ftruncate64(int fd, off_t length)
{
    return next_action(TRUNCATE, fd) == PASS ? REAL(ftruncate64)(fd, length) : failed(fail_with);
}

int ftruncate(int fd, off_t length)
{
    return ftruncate64(fd, length);
}

int usleep(useconds_t duration_us)
{
    return REAL(usleep)(duration_us / 20);
}

/* Taking a lock can fail; releasing it cannot. */
#define FCNTL(name) \
    int name(int fd, int command, ...) \
    { \
        va_list rest; \
        va_start(rest, command); \
        void *argument = va_arg(rest, void *); \
        va_end(rest); \
        int locks = command == F_SETLK || command == F_SETLKW; \
        if (locks && ((struct flock *)argument)->l_type != F_UNLCK && next_action(LOCK, fd) != PASS) \
            return failed(fail_with); \
        return REAL(name)(fd, command, argument); \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

int flock(int fd, int operation)
{
    if (!(operation & LOCK_UN) && next_action(LOCK, fd) != PASS)
        return failed(fail_with);
    return REAL(flock)(fd, operation);
}

int unlink(const char *path)
{
    return fails(UNLINK, path) ? -1 : REAL(unlink)(path);
}

int unlinkat(int at, const char *path, int flags)
{
    return fails(UNLINK, path) ? -1 : REAL(unlinkat)(at, path, flags);
}

int rename(const char *from, const char *to)
{
    return fails(RENAME, to) ? -1 : REAL(rename)(from, to);
}

int link(const char *from, const char *to)
{
    return fails(RENAME, to) ? -1 : REAL(link)(from, to);
}

int linkat(int from_at, const char *from, int to_at, const char *to, int flags)
{
    return fails(RENAME, to) ? -1 : REAL(linkat)(from_at, from, to_at, to, flags);
}
