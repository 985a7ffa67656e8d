-- One step of the alerts worker, if it still holds the lease.
-- KEYS: lease, state, open, acks
-- ARGV: token, number of state items, items (field, value)..., number of alert items, items (id, JSON)...,
--       number of alerts to remove, ids..., number of acknowledgements taken, ids...
-- Returns {status, detail}: OK, FENCED (another owner).
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return {'FENCED', redis.call('HGET', KEYS[1], 'owner') or ''} end
-- Deleting needs no memory, and what follows a write may go beyond maxmemory: a full Redis is worth an alert.
redis.call('HDEL', KEYS[2], '')
local at = 2
for hash = 2, 3 do
  local n = tonumber(ARGV[at])
  for i = at + 1, at + n, 2 do redis.call('HSET', KEYS[hash], ARGV[i], ARGV[i + 1]) end
  at = at + n + 1
end
for hash = 3, 4 do
  local n = tonumber(ARGV[at])
  for i = at + 1, at + n do redis.call('HDEL', KEYS[hash], ARGV[i]) end
  at = at + n + 1
end
return {'OK', ''}
