// To be preloaded (LD_PRELOAD) into a server under test: while the file $DISK_FULL exists and names a folder, writes that
// would make a file below that folder longer fail with ENOSPC, as on a full disk; while $SYNC_FAILS exists, fdatasync and
// fsync fail with EIO. It needs no rights and no mount.
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

namespace {

template <class Fn>
Fn real(const char *name) {
    return (Fn)dlsym(RTLD_NEXT, name);
}

// The folder that is full, or false.
bool full_folder(char *folder, size_t size) {
    const char *flag = getenv("DISK_FULL");
    if (flag == NULL || access(flag, F_OK) != 0) return false;
    static auto real_read = real<ssize_t (*)(int, void *, size_t)>("read");
    const int fd = open(flag, O_RDONLY);
    if (fd < 0) return false;
    const ssize_t n = real_read(fd, folder, size - 1);
    close(fd);
    if (n <= 0) return false;
    folder[n] = 0;
    return true;
}

bool is_full(int fd, off_t end) {
    const int saved = errno;
    char folder[PATH_MAX], link[64], path[PATH_MAX];
    bool full = false;
    if (full_folder(folder, sizeof folder)) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        const ssize_t n = readlink(link, path, sizeof path - 1);
        struct stat status;
        full = n > 0 && (path[n] = 0, strncmp(path, folder, strlen(folder)) == 0) && fstat(fd, &status) == 0 &&
               S_ISREG(status.st_mode) && end > status.st_size;
    }
    errno = full ? ENOSPC : saved;
    return full;
}

off_t total(const struct iovec *vectors, int n) {
    off_t bytes = 0;
    for (int i = 0; i < n; i++) bytes += vectors[i].iov_len;
    return bytes;
}

bool sync_fails() {
    const char *flag = getenv("SYNC_FAILS");
    if (flag == NULL || access(flag, F_OK) != 0) return false;
    errno = EIO;
    return true;
}

}  // namespace

// The C library has each function under a second name for programs with 64-bit offsets.
extern "C" {

ssize_t write(int fd, const void *data, size_t size) {
    static auto next = real<ssize_t (*)(int, const void *, size_t)>("write");
    return is_full(fd, lseek(fd, 0, SEEK_CUR) + (off_t)size) ? -1 : next(fd, data, size);
}

#define PWRITE(name)                                                                 \
    ssize_t name(int fd, const void *data, size_t size, off_t at) {                  \
        static auto next = real<ssize_t (*)(int, const void *, size_t, off_t)>(#name); \
        return is_full(fd, at + (off_t)size) ? -1 : next(fd, data, size, at);        \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define PWRITEV(name)                                                                        \
    ssize_t name(int fd, const struct iovec *vectors, int n, off_t at) {                     \
        static auto next = real<ssize_t (*)(int, const struct iovec *, int, off_t)>(#name);  \
        return is_full(fd, at + total(vectors, n)) ? -1 : next(fd, vectors, n, at);          \
    }
PWRITEV(pwritev)
PWRITEV(pwritev64)

#define ALLOCATE(name)                                                            \
    int name(int fd, off_t at, off_t size) {                                      \
        static auto next = real<int (*)(int, off_t, off_t)>(#name);               \
        return is_full(fd, at + size) ? ENOSPC : next(fd, at, size);              \
    }
ALLOCATE(posix_fallocate)
ALLOCATE(posix_fallocate64)

int fdatasync(int fd) {
    static auto next = real<int (*)(int)>("fdatasync");
    return sync_fails() ? -1 : next(fd);
}

int fsync(int fd) {
    static auto next = real<int (*)(int)>("fsync");
    return sync_fails() ? -1 : next(fd);
}
}
