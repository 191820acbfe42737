/* A preloaded library that records all operations on the files of one folder, DSPEX_RECORD_FOLDER (an absolute path).
 *
 * Each operation is a record in the file DSPEX_RECORD_LOG (disk.py reads it): a header of 40 bytes, then `length`
 * bytes. An operation is recorded after it is done; a sync also before, because it covers the writes up to its begin.
 *
 *   O open (name)    C open and truncate (name)    W write (bytes)    T truncate (to `offset`)
 *   B a sync begins  S it has ended    U unlink (name)    R rename, L link (two names, a zero between them)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define DESCRIPTORS 65536

struct record {
    char operation;
    char unused[3];
    uint32_t file, process, unused_too;
    uint64_t at_ns, offset, length;
};

static const char *folder;
static size_t folder_length;
static int log_file = -1;
static uint32_t files[DESCRIPTORS]; /* by descriptor: the number under which it was opened; 0: not ours */
static uint32_t last_file;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void load(void)
{
    const char *log = getenv("DSPEX_RECORD_LOG");

    folder = getenv("DSPEX_RECORD_FOLDER");
    if (folder == NULL || log == NULL)
        return;
    folder_length = strlen(folder);
    log_file = REAL(open)(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static void note(char operation, uint32_t file, uint64_t offset, const void *content, size_t length)
{
    struct record record = {operation, {0}, file, (uint32_t)getpid(), 0, 0, offset, length};
    struct iovec parts[2] = {{&record, sizeof record}, {(void *)content, length}};
    struct timespec now;

    if (log_file < 0)
        return;
    pthread_mutex_lock(&mutex);
    clock_gettime(CLOCK_MONOTONIC, &now);
    record.at_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    /* An incomplete log would lead to wrong results. */
    if (writev(log_file, parts, 2) != (ssize_t)(sizeof record + length))
        abort();
    pthread_mutex_unlock(&mutex);
}

/* The name of `path` in the folder; NULL if it is elsewhere. `buffer` holds PATH_MAX bytes. */
static const char *name_of(int at, const char *path, char *buffer)
{
    char link[64], base[PATH_MAX];
    ssize_t length;

    if (folder == NULL)
        return NULL;
    if (path[0] != '/') {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        length = readlink(at == AT_FDCWD ? "/proc/self/cwd" : link, base, sizeof base - 1);
        if (length <= 0)
            return NULL;
        base[length] = 0;
        if (snprintf(buffer, PATH_MAX, "%s/%s", base, path) >= PATH_MAX)
            return NULL;
        path = buffer;
    }
    if (strncmp(path, folder, folder_length) != 0 || path[folder_length] != '/')
        return NULL;
    path += folder_length + 1;
    return strchr(path, '/') == NULL && strstr(path, "-shm") == NULL ? path : NULL;
}

static int is_ours(int fd)
{
    return fd >= 0 && fd < DESCRIPTORS && files[fd] != 0;
}

static int opened(int fd, int flags)
{
    char link[64], path[PATH_MAX], buffer[PATH_MAX];
    const char *name;
    ssize_t length;

    if (fd < 0 || fd >= DESCRIPTORS || folder == NULL)
        return fd;
    files[fd] = 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    if (length <= 0)
        return fd;
    path[length] = 0;
    if (strcmp(path, folder) == 0)
        name = ""; /* the folder itself: it is synced as well */
    else if ((name = name_of(AT_FDCWD, path, buffer)) == NULL)
        return fd;
    files[fd] = __sync_add_and_fetch(&last_file, 1);
    note(flags & O_TRUNC ? 'C' : 'O', files[fd], 0, name, strlen(name));
    return fd;
}

static mode_t mode_in(int flags, va_list rest)
{
    return flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) \
    { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = mode_in(flags, rest); \
        va_end(rest); \
        return opened(REAL(name)(path, flags, mode), flags); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) \
    { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = mode_in(flags, rest); \
        va_end(rest); \
        return opened(REAL(name)(at, path, flags, mode), flags); \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int fd)
{
    if (is_ours(fd))
        files[fd] = 0;
    return REAL(close)(fd);
}

ssize_t write(int fd, const void *content, size_t count)
{
    off_t offset = is_ours(fd) ? lseek(fd, 0, SEEK_CUR) : 0;
    ssize_t written = REAL(write)(fd, content, count);

    if (written > 0 && is_ours(fd))
        note('W', files[fd], (uint64_t)offset, content, (size_t)written);
    return written;
}

#define PWRITE(name) \
    ssize_t name(int fd, const void *content, size_t count, off_t offset) \
    { \
        ssize_t written = REAL(name)(fd, content, count, offset); \
        if (written > 0 && is_ours(fd)) \
            note('W', files[fd], (uint64_t)offset, content, (size_t)written); \
        return written; \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define SYNC(name) \
    int name(int fd) \
    { \
        if (!is_ours(fd)) \
            return REAL(name)(fd); \
        note('B', files[fd], 0, NULL, 0); \
        int result = REAL(name)(fd); \
        if (result == 0) \
            note('S', files[fd], 0, NULL, 0); \
        return result; \
    }
SYNC(fsync)
SYNC(fdatasync)

#define TRUNCATE(name) \
    int name(int fd, off_t length) \
    { \
        int result = REAL(name)(fd, length); \
        if (result == 0 && is_ours(fd)) \
            note('T', files[fd], (uint64_t)length, NULL, 0); \
        return result; \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

static int unlinked(int result, int at, const char *path)
{
    char buffer[PATH_MAX];
    const char *name;

    if (result == 0 && (name = name_of(at, path, buffer)) != NULL)
        note('U', 0, 0, name, strlen(name));
    return result;
}

int unlink(const char *path)
{
    return unlinked(REAL(unlink)(path), AT_FDCWD, path);
}

int unlinkat(int at, const char *path, int flags)
{
    return unlinked(REAL(unlinkat)(at, path, flags), at, path);
}

static int moved(char operation, int result, int from_at, const char *from, int to_at, const char *to)
{
    char from_buffer[PATH_MAX], to_buffer[PATH_MAX], both[2 * PATH_MAX];
    const char *old, *new;

    if (result != 0)
        return result;
    old = name_of(from_at, from, from_buffer);
    new = name_of(to_at, to, to_buffer);
    if (old != NULL && new != NULL) {
        memcpy(both, old, strlen(old) + 1);
        memcpy(both + strlen(old) + 1, new, strlen(new));
        note(operation, 0, 0, both, strlen(old) + 1 + strlen(new));
    }
    return result;
}

int rename(const char *from, const char *to)
{
    return moved('R', REAL(rename)(from, to), AT_FDCWD, from, AT_FDCWD, to);
}

int renameat(int from_at, const char *from, int to_at, const char *to)
{
    return moved('R', REAL(renameat)(from_at, from, to_at, to), from_at, from, to_at, to);
}

int link(const char *from, const char *to)
{
    return moved('L', REAL(link)(from, to), AT_FDCWD, from, AT_FDCWD, to);
}

int linkat(int from_at, const char *from, int to_at, const char *to, int flags)
{
    return moved('L', REAL(linkat)(from_at, from, to_at, to, flags), from_at, from, to_at, to);
}
