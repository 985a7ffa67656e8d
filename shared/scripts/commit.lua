-- One step of a stage: state, outputs and input position together, if the lease and the position still hold.
-- KEYS: lease, meta, state, consumers of the input, then per output topic: stream, info
-- ARGV: token, stage, from pos, new pos, records, last_ns, out seq, number of output topics,
--       then per topic: bound, bytes, records, frames, last_ns
--       then number of state items, items (field, value)..., number of deleted fields, fields...
--       then per topic, per frame: number of items, items...
-- Returns {status, detail}: OK, FENCED (another owner), CONFLICT (another position), FULL (an output is at its bound).
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return {'FENCED', redis.call('HGET', KEYS[1], 'owner') or ''} end
local pos = redis.call('HGET', KEYS[2], 'pos') or '0-0'
if pos ~= ARGV[3] then return {'CONFLICT', pos} end
local topics = tonumber(ARGV[8])
for i = 1, topics do
  local held = tonumber(redis.call('HGET', KEYS[4 + 2 * i], 'bytes') or '0')
  if tonumber(ARGV[4 + 5 * i + 3]) > 0 and held >= tonumber(ARGV[4 + 5 * i]) then return {'FULL', KEYS[3 + 2 * i]} end
end
-- Deleting needs no memory, and what follows a write may go beyond maxmemory: a full Redis empties by commits only.
redis.call('HDEL', KEYS[2], '')
local at = 9 + 5 * topics
local n = tonumber(ARGV[at])
for i = at + 1, at + n, 2 do redis.call('HSET', KEYS[3], ARGV[i], ARGV[i + 1]) end
at = at + n + 1
n = tonumber(ARGV[at])
for i = at + 1, at + n do redis.call('HDEL', KEYS[3], ARGV[i]) end
at = at + n + 1
for i = 1, topics do
  local base = 4 + 5 * i
  local frames = tonumber(ARGV[base + 3])
  for _ = 1, frames do
    local m = tonumber(ARGV[at])
    redis.call('XADD', KEYS[3 + 2 * i], '*', unpack(ARGV, at + 1, at + m))
    redis.call('HINCRBY', KEYS[4 + 2 * i], 'kind:' .. ARGV[at + 2], ARGV[at + 4])
    at = at + m + 1
  end
  if frames > 0 then
    local info = KEYS[4 + 2 * i]
    redis.call('HINCRBY', info, 'bytes', ARGV[base + 1])
    redis.call('HINCRBY', info, 'records', ARGV[base + 2])
    redis.call('HINCRBY', info, 'frames', frames)
    redis.call('HSET', info, 'last_ns', ARGV[base + 4])
  end
end
redis.call('HSET', KEYS[2], 'pos', ARGV[4], 'out_seq', ARGV[7], 'last_ns', ARGV[6])
redis.call('HINCRBY', KEYS[2], 'records', ARGV[5])
redis.call('HINCRBY', KEYS[2], 'commits', 1)
redis.call('HSET', KEYS[4], ARGV[2], ARGV[4])
return {'OK', ''}
