/* The command line and the configuration file of repfs (SPEC 14): every option is one key of one table, whether it
 * stands as --KEY, in -o, or in the file. The command line wins over the file.
 */
#ifndef REPFS_FS_OPTIONS_H
#define REPFS_FS_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

#include "core/err.h"
#include "core/os/log.h"
#include "fs/mount.h"

#define OPTIONS_TEXT_MAX 4096	      /* of one value */
#define OPTIONS_CONFIG_MAX (1U << 20) /* of the configuration file, bytes */

struct options {
	char *store, *mountpoint; /* as given; owned; NULL only with help, version or check_config */
	char *listen;		  /* NULL: none */
	char *config;		  /* the file's path, NULL: none */
	char *fsname;		  /* NULL: the store's path */
	char *kernel_options;	  /* for struct mount_options, NULL: none */
	bool foreground, debug, insecure;
	bool check_config, version, help;
	bool fake; /* mount helper called with -f: do everything but the mount */
	unsigned threads;
	int durability; /* enum volume_durability, -1: the store's own */
	bool log_given;
	enum log_target log_target; /* not given: stderr in the foreground, syslog in the background */
	enum log_level log_level;
	enum log_format log_format;
	uid_t uid;
	gid_t gid;
	bool umask_given;
	mode_t umask;
	struct mount_options mount; /* fsname and kernel point into the strings above */
};

/* -ERR_USAGE: wrong, *e says what and what to do. *ret is to be freed only on success. argv is permuted. */
int options_parse(int argc, char **argv, struct options *ret, struct err *e);
void options_free(struct options *o);
void options_help(FILE *f);

#endif
