-- Add frames to a stream exactly once, with the producer's sequence and source cursor.
-- KEYS: stream, producers, info   ARGV: pid, owner, first seq, frames, records, last_ns, bytes, bound, cursor,
--       then per frame: number of field/value items, items...
-- Returns {status, last seq, id}: OK, DUPLICATE, BEHIND (the bus knows less than the caller), FULL, FENCED.
local pid, owner, first, frames = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local last = tonumber(redis.call('HGET', KEYS[2], pid .. ':seq') or '0')
local held_by = redis.call('HGET', KEYS[2], pid .. ':owner')
if not held_by then return {'BEHIND', last, ''} end -- an emptied Redis: nobody else took over, all of it was forgotten
if held_by ~= owner then return {'FENCED', last, ''} end
if first + frames - 1 <= last then return {'DUPLICATE', last, ''} end
if first ~= last + 1 then return {'BEHIND', last, ''} end
local held = tonumber(redis.call('HGET', KEYS[3], 'bytes') or '0')
if held >= tonumber(ARGV[8]) then return {'FULL', last, ''} end
local at, id = 10, ''
for _ = 1, frames do
  local n = tonumber(ARGV[at])
  id = redis.call('XADD', KEYS[1], '*', unpack(ARGV, at + 1, at + n))
  if ARGV[at + 15] == 'of' then
    for kind, count in string.gmatch(ARGV[at + 16], '(%S+) (%d+)') do
      redis.call('HINCRBY', KEYS[3], 'kind:' .. kind, count)
    end
  else
    redis.call('HINCRBY', KEYS[3], 'kind:' .. ARGV[at + 2], ARGV[at + 4])
  end
  at = at + n + 1
end
redis.call('HSET', KEYS[2], pid .. ':seq', first + frames - 1, pid .. ':cursor', ARGV[9])
redis.call('HINCRBY', KEYS[3], 'bytes', ARGV[7])
redis.call('HINCRBY', KEYS[3], 'records', ARGV[5])
redis.call('HINCRBY', KEYS[3], 'frames', frames)
redis.call('HSET', KEYS[3], 'last_ns', ARGV[6])
return {'OK', first + frames - 1, id}
