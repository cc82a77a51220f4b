/* --help and the shell completions, both made from the tables in options.c, so that they cannot differ from what the
 * parser takes.
 */
#include "cli/cli.h"

#include <string.h>

#define HELP_COLUMN 30

static void put_opt(FILE *f, const struct cli_opt *o)
{
	const char *open = o->needed ? "" : "[", *close = o->needed ? "" : "]";
	if (!o->arg)
		(void)fprintf(f, " %s--%s%s", open, o->name, close);
	else if (o->optional)
		(void)fprintf(f, " %s--%s[=%s]%s", open, o->name, o->choices ? o->choices : o->arg, close);
	else
		(void)fprintf(f, " %s--%s %s%s", open, o->name, o->choices ? o->choices : o->arg, close);
}

void cli_usage(FILE *f, const struct cli_verb *v)
{
	if (!v) {
		(void)fputs("usage: repctl [OPTION...] VERB [ARGUMENT...]\n", f);
		return;
	}
	(void)fprintf(f, "usage: repctl %s%s%s", v->name, v->args[0] ? " " : "", v->args);
	for (const struct cli_opt *o = v->opts; o && o->name; o++)
		if (!o->later)
			put_opt(f, o);
	(void)fputc('\n', f);
}

static void help_opts(FILE *f, const struct cli_opt *opts)
{
	for (const struct cli_opt *o = opts; o && o->name; o++) {
		char left[128];
		char letter[8] = "    ";
		if (o->letter)
			(void)snprintf(letter, sizeof(letter), "-%c, ", o->letter);
		(void)snprintf(left, sizeof(left), "%s--%s%s%s%s", letter, o->name,
			       o->optional ? "[="
			       : o->arg	   ? " "
					   : "",
			       !o->arg	    ? ""
			       : o->choices ? o->choices
					    : o->arg,
			       o->optional ? "]" : "");
		(void)fprintf(f, "  %-*s  %s%s\n", HELP_COLUMN, left, o->help,
			      o->later ? " (comes in a later release)" : "");
	}
}

void cli_help(FILE *f)
{
	cli_usage(f, NULL);
	(void)fputs("\nControls the repfs daemon of this host, or works on a store that no daemon uses\n"
		    "(create, import, export, list, show, check).\n\nVerbs:\n",
		    f);
	for (const struct cli_verb *v = cli_verbs; v->name; v++)
		if (v->run)
			(void)fprintf(f, "  %-14s  %s\n", v->name, v->help);
	(void)fputs("\nOptions, before or behind the verb:\n", f);
	help_opts(f, cli_global_opts);
	(void)fputs("\nVerbs that come in a later release:\n ", f);
	unsigned width = 1;
	for (const struct cli_verb *v = cli_verbs; v->name; v++) {
		if (v->run)
			continue;
		unsigned n = (unsigned)strlen(v->name) + 1;
		if (width + n > 78) {
			(void)fputs("\n ", f);
			width = 1;
		}
		(void)fprintf(f, " %s", v->name);
		width += n;
	}
	(void)fputs(
	    "\n\nExit code: 0 ok, 1 failed, 2 usage, 3 daemon unreachable, 4 no such volume, group,\n"
	    "checkpoint or job, 5 wrong state or role, 6 peer unreachable, 7 degraded, 8 split brain, 124 timed\n"
	    "out, 130 interrupted. More: repctl VERB --help, man repctl.\n",
	    f);
}

void cli_help_verb(FILE *f, const struct cli_verb *v)
{
	cli_usage(f, v);
	(void)fprintf(f, "\n%s%s\n", v->help, v->run ? "" : " (comes in a later release)");
	if (v->opts) {
		(void)fputs("\nOptions:\n", f);
		help_opts(f, v->opts);
	}
	if (v->run)
		(void)fputs("\nOptions of every verb:\n", f);
	if (v->run)
		help_opts(f, cli_global_opts);
}

/* ---- completion ---- */

/* "a|b|c" with blanks for bars. */
static void put_choices(FILE *f, const char *choices)
{
	for (const char *p = choices; *p; p++)
		(void)fputc(*p == '|' ? ' ' : *p, f);
}

static void put_names(FILE *f)
{
	bool first = true;
	for (const struct cli_verb *v = cli_verbs; v->name; v++) {
		if (!v->run)
			continue;
		(void)fprintf(f, "%s%s", first ? "" : " ", v->name);
		first = false;
	}
}

static void put_opt_words(FILE *f, const struct cli_opt *opts, bool global)
{
	for (const struct cli_opt *o = opts; o && o->name; o++) {
		if (o->later)
			continue;
		(void)fprintf(f, " --%s", o->name);
		if (global && o->letter)
			(void)fprintf(f, " -%c", o->letter);
	}
}

static bool takes_name(const struct cli_verb *v)
{
	return strncmp(v->args, "NAME", 4) == 0 || strncmp(v->args, "GROUP", 5) == 0 ||
	       strncmp(v->args, "[GROUP", 6) == 0;
}

static bool takes_file(const struct cli_verb *v)
{
	return strstr(v->args, " FILE") != NULL || strstr(v->args, " TARGET") != NULL;
}

static bool opt_is_path(const struct cli_opt *o)
{
	return o->arg && (strcmp(o->arg, "STORE") == 0 || strcmp(o->arg, "SOCKET") == 0);
}

/* The next word is its value. */
static bool takes_word(const struct cli_opt *o)
{
	return o->arg && !o->optional;
}

static void bash_values(FILE *f, const struct cli_opt *opts)
{
	for (const struct cli_opt *o = opts; o && o->name; o++) {
		if (!takes_word(o) || o->later)
			continue;
		(void)fprintf(f, "\t\t--%s", o->name);
		if (o->letter)
			(void)fprintf(f, "|-%c", o->letter);
		if (o->choices) {
			(void)fputs(") COMPREPLY=($(compgen -W \"", f);
			put_choices(f, o->choices);
			(void)fputs("\" -- \"$cur\")); return ;;\n", f);
		} else if (opt_is_path(o)) {
			(void)fputs(") COMPREPLY=($(compgen -f -- \"$cur\")); return ;;\n", f);
		} else {
			(void)fputs(") return ;;\n", f);
		}
	}
}

static void completion_bash(FILE *f)
{
	(void)fputs("# bash completion for repctl: eval \"$(repctl completion bash)\"\n"
		    "_repctl() {\n"
		    "\tlocal cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} verb= n=0 i w skip=0\n"
		    "\tlocal -a globals=()\n"
		    "\t[[ $cur == = ]] && cur= || { [[ $prev == = ]] && prev=${COMP_WORDS[COMP_CWORD-2]}; }\n"
		    "\tfor ((i = 1; i < COMP_CWORD; i++)); do\n"
		    "\t\tw=${COMP_WORDS[i]}\n"
		    "\t\tif ((skip)) && [[ $w != = ]]; then skip=0; continue; fi\n"
		    "\t\tcase $w in\n"
		    "\t\t--store|--socket|-S)\n"
		    "\t\t\tif [[ ${COMP_WORDS[i+1]} == = ]]; then globals+=(\"$w\" \"${COMP_WORDS[i+2]}\")\n"
		    "\t\t\telse globals+=(\"$w\" \"${COMP_WORDS[i+1]}\"); fi\n"
		    "\t\t\tskip=1 ;;\n"
		    "\t\t=) ;;\n",
		    f);
	/* Options with a value: the next word is not an argument. */
	(void)fputs("\t\t", f);
	bool first = true;
	for (const struct cli_opt *o = cli_global_opts; o->name; o++) {
		if (o->arg && !opt_is_path(o)) {
			(void)fprintf(f, "%s--%s", first ? "" : "|", o->name);
			first = false;
		}
	}
	for (const struct cli_verb *v = cli_verbs; v->name; v++)
		for (const struct cli_opt *o = v->opts; o && o->name; o++)
			if (takes_word(o) && !o->later)
				(void)fprintf(f, "|--%s", o->name);
	(void)fputs(") skip=1 ;;\n"
		    "\t\t-*) ;;\n"
		    "\t\t*) if [[ -z $verb ]]; then verb=$w; else ((n++)); fi ;;\n"
		    "\t\tesac\n"
		    "\tdone\n"
		    "\tcase $prev in\n",
		    f);
	bash_values(f, cli_global_opts);
	(void)fputs("\tesac\n\tcase $verb:$prev in\n", f);
	for (const struct cli_verb *v = cli_verbs; v->name; v++) {
		for (const struct cli_opt *o = v->opts; o && o->name; o++) {
			if (!takes_word(o) || o->later)
				continue;
			(void)fprintf(f, "\t%s:--%s)", v->name, o->name);
			if (o->choices) {
				(void)fputs(" COMPREPLY=($(compgen -W \"", f);
				put_choices(f, o->choices);
				(void)fputs("\" -- \"$cur\"));", f);
			}
			(void)fputs(" return ;;\n", f);
		}
	}
	(void)fputs("\tesac\n"
		    "\tif [[ $cur == -* ]]; then\n"
		    "\t\tlocal opts=\"",
		    f);
	put_opt_words(f, cli_global_opts, true);
	(void)fputs("\"\n\t\tcase $verb in\n", f);
	for (const struct cli_verb *v = cli_verbs; v->name; v++) {
		if (!v->run || !v->opts)
			continue;
		(void)fprintf(f, "\t\t%s) opts+=\"", v->name);
		put_opt_words(f, v->opts, false);
		(void)fputs("\" ;;\n", f);
	}
	(void)fputs("\t\tesac\n"
		    "\t\tCOMPREPLY=($(compgen -W \"$opts\" -- \"$cur\"))\n"
		    "\t\treturn\n"
		    "\tfi\n"
		    "\tcase $verb in\n"
		    "\t'') COMPREPLY=($(compgen -W \"",
		    f);
	put_names(f);
	(void)fputs("\" -- \"$cur\")) ;;\n"
		    "\thelp) COMPREPLY=($(compgen -W \"",
		    f);
	put_names(f);
	(void)fputs("\" -- \"$cur\")) ;;\n"
		    "\tcompletion) COMPREPLY=($(compgen -W \"bash zsh fish\" -- \"$cur\")) ;;\n"
		    "\tjob) ((n == 0)) && COMPREPLY=($(compgen -W \"pause resume cancel wait\" -- \"$cur\")) ;;\n",
		    f);
	for (const struct cli_verb *v = cli_verbs; v->name; v++)
		if (v->run && takes_file(v))
			(void)fprintf(f, "\t%s) ((n == 1)) && { COMPREPLY=($(compgen -f -- \"$cur\")); return; } ;;&\n",
				      v->name);
	first = true;
	(void)fputc('\t', f);
	for (const struct cli_verb *v = cli_verbs; v->name; v++) {
		if (!v->run || !takes_name(v))
			continue;
		(void)fprintf(f, "%s%s", first ? "" : "|", v->name);
		first = false;
	}
	(void)fputs(")\n"
		    "\t\t((n == 0)) && COMPREPLY=($(compgen -W \"$(repctl \"${globals[@]}\" --timeout 2 list --names "
		    "2>/dev/null)\" -- \"$cur\")) ;;\n"
		    "\tesac\n"
		    "}\n"
		    "complete -o filenames -o bashdefault -F _repctl repctl\n",
		    f);
}

/* Text within single quotes, of a zsh specification or of fish; help texts hold neither of them unescaped. */
static void put_quoted(FILE *f, const char *text, const char *escape)
{
	for (const char *p = text; *p; p++) {
		if (*p == '\'') {
			(void)fputs("'\\''", f);
			continue;
		}
		if (strchr(escape, *p))
			(void)fputc('\\', f);
		(void)fputc(*p, f);
	}
}

static void zsh_opts(FILE *f, const struct cli_opt *opts, const char *indent)
{
	for (const struct cli_opt *o = opts; o && o->name; o++) {
		if (o->later)
			continue;
		for (unsigned form = 0; form < (o->letter ? 2U : 1U); form++) {
			(void)fputs(indent, f);
			if (form)
				(void)fprintf(f, "'-%c%s", o->letter, o->arg ? "+" : "");
			else
				(void)fprintf(f, "'--%s%s", o->name, o->optional ? "=-" : o->arg ? "=" : "");
			(void)fputc('[', f);
			put_quoted(f, o->help, "[]:\\");
			(void)fputc(']', f);
			if (o->arg) {
				(void)fprintf(f,
					      o->optional ? "::%s:" : ":%s:", strchr(o->arg, ':') ? "value" : o->arg);
				if (o->choices) {
					(void)fputc('(', f);
					put_choices(f, o->choices);
					(void)fputc(')', f);
				} else if (opt_is_path(o)) {
					(void)fputs("_files", f);
				}
			}
			(void)fputs("' \\\n", f);
		}
	}
}

static void completion_zsh(FILE *f)
{
	(void)fputs("#compdef repctl\n"
		    "# zsh completion for repctl: source <(repctl completion zsh)\n"
		    "_repctl_names() {\n"
		    "\tlocal -a names\n"
		    "\tnames=(${(f)\"$(repctl --timeout 2 list --names 2>/dev/null)\"})\n"
		    "\tcompadd -a names\n"
		    "}\n"
		    "_repctl() {\n"
		    "\tlocal curcontext=$curcontext state line verb\n"
		    "\tlocal -a verbs globals\n"
		    "\tverbs=(\n",
		    f);
	for (const struct cli_verb *v = cli_verbs; v->name; v++) {
		if (!v->run)
			continue;
		(void)fprintf(f, "\t\t'%s:", v->name);
		put_quoted(f, v->help, ":");
		(void)fputs("'\n", f);
	}
	(void)fputs("\t)\n\tglobals=( \\\n", f);
	zsh_opts(f, cli_global_opts, "\t\t");
	(void)fputs("\t)\n"
		    "\t_arguments -C \"${globals[@]}\" '1: :->verb' '*:: :->args' && return\n"
		    "\tcase $state in\n"
		    "\tverb) _describe verb verbs ;;\n"
		    "\targs)\n"
		    "\t\tcase $line[1] in\n",
		    f);
	for (const struct cli_verb *v = cli_verbs; v->name; v++) {
		if (!v->run)
			continue;
		(void)fprintf(f, "\t\t%s) _arguments \"${globals[@]}\" \\\n", v->name);
		zsh_opts(f, v->opts, "\t\t\t");
		if (strcmp(v->name, "completion") == 0)
			(void)fputs("\t\t\t'1:shell:(bash zsh fish)'", f);
		else if (strcmp(v->name, "job") == 0)
			(void)fputs("\t\t\t'1:what:(pause resume cancel wait)' '2:id: '", f);
		else if (strcmp(v->name, "help") == 0)
			(void)fputs("\t\t\t'1: :_describe verb verbs'", f);
		else if (takes_name(v))
			(void)fputs("\t\t\t'1:name:_repctl_names'", f);
		else
			(void)fputs("\t\t\t'1: :'", f);
		if (takes_file(v))
			(void)fputs(" '2:file:_files'", f);
		(void)fputs(" ;;\n", f);
	}
	(void)fputs("\t\tesac ;;\n"
		    "\tesac\n"
		    "}\n"
		    "if [[ $funcstack[1] == _repctl ]]; then _repctl \"$@\"; else compdef _repctl repctl; fi\n",
		    f);
}

static void fish_opts(FILE *f, const struct cli_opt *opts, const char *verb)
{
	for (const struct cli_opt *o = opts; o && o->name; o++) {
		if (o->later)
			continue;
		(void)fputs("complete -c repctl", f);
		if (verb)
			(void)fprintf(f, " -n '__fish_seen_subcommand_from %s'", verb);
		(void)fprintf(f, " -l %s", o->name);
		if (o->letter)
			(void)fprintf(f, " -s %c", o->letter);
		if (opt_is_path(o)) {
			(void)fputs(" -r -F", f);
		} else if (takes_word(o)) {
			(void)fputs(" -x", f);
			if (o->choices) {
				(void)fputs(" -a '", f);
				put_choices(f, o->choices);
				(void)fputc('\'', f);
			}
		}
		(void)fputs(" -d '", f);
		/* fish escapes a quote within quotes by a backslash. */
		for (const char *p = o->help; *p; p++) {
			if (*p == '\'' || *p == '\\')
				(void)fputc('\\', f);
			(void)fputc(*p, f);
		}
		(void)fputs("'\n", f);
	}
}

static void completion_fish(FILE *f)
{
	(void)fputs("# fish completion for repctl: repctl completion fish | source\n"
		    "complete -c repctl -f\n"
		    "function __repctl_no_verb\n"
		    "\tnot __fish_seen_subcommand_from ",
		    f);
	put_names(f);
	(void)fputs("\nend\n", f);
	fish_opts(f, cli_global_opts, NULL);
	for (const struct cli_verb *v = cli_verbs; v->name; v++) {
		if (!v->run)
			continue;
		(void)fprintf(f, "complete -c repctl -n __repctl_no_verb -a %s -d '", v->name);
		for (const char *p = v->help; *p; p++) {
			if (*p == '\'' || *p == '\\')
				(void)fputc('\\', f);
			(void)fputc(*p, f);
		}
		(void)fputs("'\n", f);
		fish_opts(f, v->opts, v->name);
		if (takes_name(v))
			(void)fprintf(f,
				      "complete -c repctl -n '__fish_seen_subcommand_from %s' "
				      "-a '(repctl --timeout 2 list --names 2>/dev/null)'\n",
				      v->name);
		if (takes_file(v))
			(void)fprintf(f, "complete -c repctl -n '__fish_seen_subcommand_from %s' -F\n", v->name);
	}
	(void)fputs("complete -c repctl -n '__fish_seen_subcommand_from completion' -a 'bash zsh fish'\n"
		    "complete -c repctl -n '__fish_seen_subcommand_from job' -a 'pause resume cancel wait'\n",
		    f);
}

int cli_completion(FILE *f, const char *shell)
{
	if (strcmp(shell, "bash") == 0)
		completion_bash(f);
	else if (strcmp(shell, "zsh") == 0)
		completion_zsh(f);
	else if (strcmp(shell, "fish") == 0)
		completion_fish(f);
	else
		return -ERR_USAGE;
	return 0;
}
