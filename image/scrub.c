/* Looking at what the overlays of a volume hold (volume_scrub): each saved block is read and compared with its
 * checksum.
 *
 * A step holds the chain lock shared, like any read, so no overlay is replaced or closed under it; the cursor between
 * two steps is a checkpoint's number and an offset, which mean the same whatever joined or left the chain meanwhile.
 * A block of an undo overlay never changes once its bit is set, and its word is there by then; one of the active
 * overlay may be replaced, which its stripe excludes (layer_read). So a mismatch is never one of the moment.
 */
#include "core/check.h"
#include "image/volume_internal.h"

static uint64_t layer_key(const struct layer *l)
{
	return l->kind == LAYER_KIND_ACTIVE ? VOLUME_SCRUB_ACTIVE : l->id;
}

/* The first overlay at or behind the cursor, NULL: none is left. */
static struct layer *scrub_layer(struct volume *v, const struct volume_scrub *s)
{
	for (uint32_t i = 0; i < v->n_chain; i++)
		if (v->chain[i]->id >= s->layer)
			return v->chain[i];
	return v->active;
}

static uint64_t scrub_left(struct volume *v, const struct volume_scrub *s)
{
	uint64_t blocks = v->active ? overlay_count(v->active->o) : 0;

	for (uint32_t i = 0; i < v->n_chain; i++)
		if (v->chain[i]->id > s->layer || (v->chain[i]->id == s->layer && s->off == 0))
			blocks += overlay_count(v->chain[i]->o);
	return s->end ? 0 : blocks << BLOCK_SHIFT;
}

/* False: there is no room for it. */
static bool scrub_note(struct volume_scrub *s, uint64_t layer, uint64_t off, uint64_t len, int error)
{
	if (s->n && s->bad[s->n - 1].layer == layer && s->bad[s->n - 1].error == error &&
	    s->bad[s->n - 1].off + s->bad[s->n - 1].len == off) {
		s->bad[s->n - 1].len += len;
		return true;
	}
	if (s->n == VOLUME_SCRUB_BAD_MAX)
		return false;
	s->bad[s->n].layer = layer;
	s->bad[s->n].off = off;
	s->bad[s->n].len = len;
	s->bad[s->n++].error = error;
	return true;
}

/* False: the budget, or the room for what is bad, is used up. */
static bool scrub_blocks(struct volume *v, struct layer *l, struct volume_scrub *s, uint64_t budget)
{
	uint64_t blocks = volume_blocks(v), block = s->off >> BLOCK_SHIFT;
	uint8_t buf[BLOCK_SIZE];

	for (; (block = bits_next_set(l->held, block, blocks)) < blocks; block++) {
		uint64_t off = block << BLOCK_SHIFT, len = min_u64(BLOCK_SIZE, v->size - off);
		int rc;

		s->off = off;
		if (s->bytes >= budget)
			return false;
		rc = layer_read(v, l, off, len, buf);
		if (rc < 0 && !scrub_note(s, layer_key(l), off, len, rc))
			return false;
		s->bytes += BLOCK_SIZE;
	}
	return true;
}

void volume_scrub(struct volume *v, struct volume_scrub *s, uint64_t budget)
{
	struct layer *l;

	s->end = false;
	s->bytes = 0;
	s->n = 0;
	volume_lock_shared(v);
	while ((l = scrub_layer(v, s)) != NULL) {
		uint64_t key = layer_key(l);

		if (key != s->layer)
			s->off = 0;
		if (s->off == 0) /* what the medium has, not what is remembered of it */
			overlay_forget(l->o);
		s->layer = key;
		if (!scrub_blocks(v, l, s, budget))
			break;
		if (key == VOLUME_SCRUB_ACTIVE) {
			l = NULL;
			break;
		}
		s->layer = key + 1;
		s->off = 0;
	}
	s->end = l == NULL;
	s->left = scrub_left(v, s);
	volume_unlock(v);
}
