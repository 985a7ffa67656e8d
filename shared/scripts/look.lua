-- One look at a stream from a reader's place; reads only.
-- KEYS: stream, info   ARGV: id of the place
-- Returns {first entry, newest entry not after the place, entries held, frames ever added}; an entry is {id, seq} or {}.
local function one(found)
  if not found then return {} end
  for i = 1, #found[2], 2 do if found[2][i] == 'seq' then return {found[1], found[2][i + 1]} end end
  return {found[1]}
end
return {
  one(redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]),
  one(redis.call('XREVRANGE', KEYS[1], ARGV[1], '-', 'COUNT', 1)[1]),
  redis.call('XLEN', KEYS[1]),
  tonumber(redis.call('HGET', KEYS[2], 'frames') or '0'),
}
