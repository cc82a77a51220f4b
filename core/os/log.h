/* Logging for fs/ and cli/ (libraries return errors, they do not log). One line an event, one call an event. */
#ifndef REPFS_CORE_OS_LOG_H
#define REPFS_CORE_OS_LOG_H

#include <stdbool.h>

#include "core/err.h"

enum log_level { LOG_LEVEL_ERROR, LOG_LEVEL_WARN, LOG_LEVEL_INFO, LOG_LEVEL_DEBUG };
enum log_target { LOG_STDERR, LOG_JOURNAL, LOG_SYSLOG };
enum log_format { LOG_TEXT, LOG_JSON };

/* Before any thread starts. Installs check_hook too. program is borrowed for ever. */
void log_init(const char *program, enum log_target target, enum log_format format, enum log_level level);
void log_set_level(enum log_level level);
bool log_enabled(enum log_level level);
/* subject: the group or volume or "" ; one line, no newline. Thread-safe. Journal and syslog both go through syslog(3)
 * with the right priority (journald collects it); stderr lines start with the time and level. */
void log_line(enum log_level level, const char *subject, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

#define log_error(subject, ...) log_line(LOG_LEVEL_ERROR, subject, __VA_ARGS__)
#define log_warn(subject, ...) log_line(LOG_LEVEL_WARN, subject, __VA_ARGS__)
#define log_info(subject, ...) log_line(LOG_LEVEL_INFO, subject, __VA_ARGS__)
#define log_debug(subject, ...)                                                                                        \
	do {                                                                                                           \
		if (log_enabled(LOG_LEVEL_DEBUG))                                                                      \
			log_line(LOG_LEVEL_DEBUG, subject, __VA_ARGS__);                                               \
	} while (0)

#endif
