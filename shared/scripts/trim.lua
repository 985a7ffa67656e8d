-- Trim a stream to the lowest position of its consumers, but not below the debugging window before its
-- newest entry, unless more than half of the byte bound is held.
-- KEYS: stream, info, consumers   ARGV: window ms, bound bytes, entries always kept   Returns entries removed.
local positions = redis.call('HVALS', KEYS[3])
local length = redis.call('XLEN', KEYS[1])
local held = tonumber(redis.call('HGET', KEYS[2], 'bytes') or '0')
local keep = tonumber(ARGV[3])
-- Entries so large that the kept ones alone would fill the stream: the newest is enough.
if length > 0 and held / length * keep > tonumber(ARGV[2]) / 4 then keep = 1 end
if #positions == 0 or length <= keep then return 0 end
local ms, sq = math.huge, 0
for _, id in ipairs(positions) do
  local a, b = string.match(id, '(%d+)-(%d+)')
  a, b = tonumber(a), tonumber(b)
  if a < ms or (a == ms and b < sq) then ms, sq = a, b end
end
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1][1]
local last_ms, last_sq = string.match(newest, '(%d+)-(%d+)')
last_ms, last_sq = tonumber(last_ms), tonumber(last_sq)
if held < tonumber(ARGV[2]) / 2 then
  local edge = last_ms - tonumber(ARGV[1])
  if edge < ms then ms, sq = edge, 0 end
end
if ms <= 0 then return 0 end
local removed
if ms > last_ms or (ms == last_ms and sq >= last_sq) then
  removed = redis.call('XTRIM', KEYS[1], 'MAXLEN', keep)
else
  removed = redis.call('XTRIM', KEYS[1], 'MINID', string.format('%.0f-%.0f', ms, sq + 1))
end
if removed > 0 then
  local left = length - removed
  redis.call('HSET', KEYS[2], 'bytes', string.format('%.0f', left == 0 and 0 or math.floor(held * left / length)))
end
return removed
