-- What a backup's manifest says of a table, whose name comes in place of {table}. Each row's whole text is hashed twice with
-- 64 bits, by the function that hash partitioning rests on and that therefore never changes; the sums do not depend on the
-- rows' order, and no two rows cancel each other out.

-- name: table_content
SELECT count(*) AS rows, coalesce(sum(hashtextextended(x, 0)), 0) AS a, coalesce(sum(hashtextextended(x, 1)), 0) AS b
FROM (SELECT (r.*)::text AS x FROM {table} AS r OFFSET 0) AS s;
