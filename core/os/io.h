/* Whole-range file I/O on descriptors; 0 or -ERR_x; EINTR and short transfers are carried on. */
#ifndef REPFS_CORE_OS_IO_H
#define REPFS_CORE_OS_IO_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "core/err.h"

int io_pread(int fd, void *buf, size_t len, uint64_t off); /* past the end: zeroes */
int io_pwrite(int fd, const void *buf, size_t len, uint64_t off);
/* Streams (pipes, sockets, files): read exactly len, -ERR_PEER at end of file before that. */
int io_read_full(int fd, void *buf, size_t len);
int io_write_full(int fd, const void *buf, size_t len);
int io_fsync_dir(const char *path);
/* mkdir -p of the parents is not done. Copies path's folder part into dir[size] ("." if none). */
void io_dirname(const char *path, char *dir, size_t size);
/* Whole small file into an owned, terminated buffer; -ERR_LIMIT above max. */
int io_read_file(const char *path, size_t max, char **ret, size_t *ret_len);

#endif
