-- How far consumers of a stream are behind; reads only.
-- KEYS: stream   ARGV: most entries to count, then positions...
-- Returns {newest id, entries held,
--   per position: {records behind, entries behind, 1 if all were counted, `last` at the position, id of the first entry behind it}}
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local out = {newest and newest[1] or '0-0', redis.call('XLEN', KEYS[1])}
local function field(entry, name)
  for i = 1, #entry[2], 2 do if entry[2][i] == name then return entry[2][i + 1] end end
  return ''
end
local limit = tonumber(ARGV[1])
for i = 2, #ARGV do
  local at, records, entries, all, first = ARGV[i], 0, 0, 1, ''
  local here = redis.call('XRANGE', KEYS[1], at, at)[1]
  local last = here and field(here, 'last') or ''
  if at == out[1] then
    out[#out + 1] = {0, 0, 1, last, ''}
  else
    while true do
      local some = redis.call('XRANGE', KEYS[1], '(' .. at, '+', 'COUNT', 20)
      for _, entry in ipairs(some) do
        if entries == 0 then first = entry[1] end
        records = records + (tonumber(field(entry, 'count')) or 0)
        entries = entries + 1
        at = entry[1]
      end
      if #some < 20 then break end
      if entries >= limit then all = 0 break end
    end
    out[#out + 1] = {records, entries, all, last, first}
  end
end
return out
