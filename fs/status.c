/* Status as JSON (SPEC 14): what `repctl status --json` prints and status/GROUP.json holds. What this host does not
 * know is null, never absent and never guessed (I17). */
#include <stdio.h>
#include <string.h>

#include "core/os/clock.h"
#include "fs/jobs.h"
#include "fs/repl_shell.h"

static json_t *error_json(const struct repl_error *x)
{
	if (x->code == 0)
		return json_null();
	char t[40];
	clock_format(x->time_ns, t, sizeof(t));
	return json_pack("{s:s, s:s, s:o, s:I, s:I, s:s, s:s}", "code", err_name(x->code), "operation", x->operation,
			 "volume", x->volume[0] ? json_string(x->volume) : json_null(), "offset", (json_int_t)x->off,
			 "length", (json_int_t)x->len, "time", t, "text", x->text);
}

/* Of a volume's overlays. Looked at before group.lock is taken: a chain's lock may be held across I/O. */
struct overlays {
	uint64_t active, hidden;
	struct volume_counters c;
};

static void overlays_look(struct group *g, struct overlays o[GROUP_VOLUMES_MAX])
{
	for (uint32_t i = 0; i < g->n_vols; i++) {
		struct volume *v = g->vols[i]->vol;
		o[i].active = volume_active_blocks(v) * BLOCK_SIZE;
		o[i].hidden = volume_undo_blocks(v, 0) * BLOCK_SIZE;
		volume_counters(v, &o[i].c);
	}
}

static json_t *volume_json(struct group *g, const struct repl_meta *m, uint32_t i, const struct overlays *o)
{
	struct gvol *v = g->vols[i];
	char path[4096 + NAME_SIZE];
	(void)snprintf(path, sizeof(path), "%s/volumes/%s", g->d->cfg.mount ? g->d->cfg.mount : "", v->name);
	uint64_t detached = repl_detached(g->core), shown = 0;
	for (uint32_t k = 0; k < m->n_ckpts; k++)
		shown += repl_shows_ckpt(g->core, k);
	const char *format, *base = volume_base(v->vol, &format);
	return json_pack("{s:s, s:I, s:I, s:o, s:I, s:I, s:I, s:I, s:b, s:s?}", "name", v->name, "id",
			 (json_int_t)m->volumes[i].id, "size", (json_int_t)volume_size(v->vol), "path",
			 g->d->cfg.mount ? json_string(path) : json_null(), "active_bytes", (json_int_t)o->active,
			 "hidden_bytes", (json_int_t)o->hidden, "history_bytes", (json_int_t)o->c.history_bytes,
			 "checkpoints", (json_int_t)shown, "detached", (int)(detached >> i & 1), "base", base);
}

static json_t *counters_json(const struct group *g, const struct repl_counters *c, const struct overlays *o)
{
	uint64_t cow = 0;
	for (uint32_t i = 0; i < g->n_vols; i++)
		cow += o[i].c.cow_bytes;
	return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "writes", (json_int_t)c->writes,
			 "write_bytes", (json_int_t)c->write_bytes, "flushes", (json_int_t)c->flushes, "sent_bytes",
			 (json_int_t)c->sent_bytes, "received_bytes", (json_int_t)c->received_bytes, "resync_bytes",
			 (json_int_t)c->resync_bytes, "cow_bytes", (json_int_t)cow, "checkpoints",
			 (json_int_t)c->checkpoints, "reconnects", (json_int_t)c->reconnects);
}

static json_t *resync_json(const struct repl_status *s)
{
	if (!s->resync)
		return json_null();
	uint64_t left = s->resync_total - s->resync_done;
	return json_pack("{s:I, s:I, s:I, s:o}", "done", (json_int_t)s->resync_done, "total",
			 (json_int_t)s->resync_total, "rate", (json_int_t)s->resync_rate, "eta_s",
			 s->resync_rate ? json_real((double)left / (double)s->resync_rate) : json_null());
}

static json_t *peer_json(struct group *g, const struct repl_meta *m)
{
	if (m->peer[0])
		return json_string(m->peer);
	return g->conn ? json_string(link_peer_name(g->conn->link)) : json_null();
}

static json_t *seconds_since(uint64_t wall_ns)
{
	uint64_t now = clock_wall_ns();
	if (wall_ns == 0)
		return json_null();
	return json_real((double)(now > wall_ns ? now - wall_ns : 0) / (double)NS_PER_SEC);
}

json_t *group_status_json(struct group *g)
{
	struct repl_status s;
	struct overlays overlays[GROUP_VOLUMES_MAX];
	char gen[20];
	json_t *clones = group_clones_json(g, NULL);
	overlays_look(g, overlays);
	json_t *jobs = jobs_json(g->d->jobs, g->name);
	mutex_lock(&g->lock);
	const struct repl_meta *m = repl_meta(g->core);
	repl_status(g->core, clock_mono_ns(), &s);
	json_t *reasons = json_array(), *volumes = json_array();
	for (unsigned i = 0; i < s.n_reasons; i++)
		json_array_append_new(reasons, json_string(s.reasons[i]));
	for (uint32_t i = 0; i < m->n_volumes; i++)
		json_array_append_new(volumes, volume_json(g, m, i, &overlays[i]));
	(void)snprintf(gen, sizeof(gen), "%016llx", (unsigned long long)m->lineage.current);
	bool valid = s.checkpoint != 0 && !m->broken;
	char protocol[8];
	settings_format(&m->settings, SETTING_protocol, protocol, sizeof(protocol));
	json_t *j = json_pack("{s:s, s:s, s:s, s:s, s:s, s:s, s:o, s:o, s:o, s:o, s:o, s:b, s:b}", "group", g->name,
			      "role", role_name(m->role), "state", state_name(m->state), "link",
			      link_state_name(s.link), "protocol", protocol, "health",
			      m->split_brain ? "split_brain"
			      : s.degraded   ? "degraded"
					     : "ok",
			      "reasons", reasons, "peer", peer_json(g, m), "generation",
			      m->lineage.current ? json_string(gen) : json_null(), "checkpoint",
			      s.checkpoint ? json_integer((json_int_t)s.checkpoint) : json_null(), "checkpoint_age_s",
			      seconds_since(s.checkpoint_time_ns), "checkpoint_valid", (int)valid, "split_brain",
			      (int)m->split_brain);
	json_t *rest = json_pack(
	    "{s:o, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "rpo_s",
	    s.rpo_known ? json_real((double)s.rpo_ns / (double)NS_PER_SEC) : json_null(), "dirty_bytes",
	    (json_int_t)s.dirty_bytes, "queue_bytes", (json_int_t)s.queue_bytes, "resync", resync_json(&s), "commit",
	    s.commit ? json_pack("{s:I, s:I}", "done", (json_int_t)s.commit_done, "total", (json_int_t)s.commit_total)
		     : json_null(),
	    "error", error_json(&s.error), "counters", counters_json(g, &s.counters, overlays), "volumes", volumes,
	    "clones", clones, "jobs", jobs);
	mutex_unlock(&g->lock);
	json_object_update(j, rest);
	json_decref(rest);
	return j;
}

json_t *daemon_unserved_json(struct daemon *d)
{
	json_t *list = json_array();
	pthread_rwlock_rdlock(&d->names);
	for (const struct unserved *u = d->unserved; u; u = u->next) {
		json_t *names = json_array();
		for (uint32_t i = 0; i < u->n_volumes; i++)
			json_array_append_new(names, json_string(u->volumes[i]));
		json_array_append_new(list,
				      json_pack("{s:s, s:o, s:s}", "group", u->group, "volumes", names, "why", u->why));
	}
	pthread_rwlock_unlock(&d->names);
	return list;
}

json_t *daemon_status(struct daemon *d, const char *name)
{
	json_t *groups = json_array();
	struct group *all[STORE_GROUPS_MAX];
	unsigned n = 0;
	if (name) {
		struct group *g = daemon_group(d, name);
		if (g)
			all[n++] = g;
	} else {
		pthread_rwlock_rdlock(&d->names);
		for (struct group *g = d->groups; g && n < STORE_GROUPS_MAX; g = g->next)
			all[n++] = group_ref(g);
		pthread_rwlock_unlock(&d->names);
	}
	for (unsigned i = 0; i < n; i++) {
		json_array_append_new(groups, group_status_json(all[i]));
		group_unref(all[i]);
	}
	if (name && n == 0) {
		json_decref(groups);
		return NULL;
	}
	const char *listen = daemon_listen_addr(d);
	return json_pack("{s:i, s:o, s:o, s:o}", "schema", 1, "groups", groups, "unserved",
			 name ? json_array() : daemon_unserved_json(d), "listen",
			 listen ? json_string(listen) : json_null());
}
