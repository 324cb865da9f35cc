//+------------------------------------------------------------------+
//|                                              CandleCollector.mq5 |
//|  Posts the terminal's candles to the gateway of mt5-trading-     |
//|  system. How to set it up, click by click: connecting-mt5.md     |
//+------------------------------------------------------------------+
//  A timer looks at the newest bars of every series. What closed since the last look becomes a payload, which is written
//  to MQL5\Files\<folder>\queue before it is sent and deleted when the gateway has answered that it is stored. Whatever
//  leaves it unknown whether that happened (no answer, 408, 429, 5xx) is answered by sending the same bytes again.
//
//  Nothing is ever dropped. While the queue is full, or history waits behind it, bars are simply not collected: they stay
//  in the terminal's own history, and the place reached in each series is remembered in <folder>\state.txt.
//
//  A payload is ASCII with one candle a line, so that it can be cut in two without understanding JSON.
#property copyright "mt5-trading-system, Apache-2.0"
#property version   "1.00"
#property description "Posts closed candles (and the forming one) of many symbols and timeframes to a gateway."
#property description "First allow the gateway's address: Tools > Options > Expert Advisors > Allow WebRequest for listed URL."
#property strict

input string InpUrl          = "http://127.0.0.1:8001"; // Gateway address, as in the list of allowed URLs
input string InpApiKey       = "";                      // API key (empty: the gateway has none)
input string InpSymbols      = "";                      // Symbols, comma-separated (empty: all of Market Watch)
input string InpTimeframes   = "M1";                    // Timeframes, comma-separated: M1,M5,H1 ...
input int    InpTimerSeconds = 1;                       // Seconds between two looks
input bool   InpSendForming  = true;                    // Send the forming bar too (shown, never stored)
input int    InpHistoryBars  = 5000;                    // Bars of history on the first run (0: none)
input int    InpChunk        = 1000;                    // Candles in one payload, about
input string InpSource       = "";                      // This terminal's name (empty: the account's server)
input int    InpTimeoutMs    = 5000;                    // Milliseconds to wait for an answer
input int    InpQueueFiles   = 5000;                    // Payloads kept on disk while the gateway is away
input string InpFolder       = "CandleCollector";       // Folder in MQL5\Files (one for each chart with this EA)

#define KEEP            16      // newest finished bars of a series that are compared with what was sent
#define TAIL            18      // bars read at each look: those, the forming one and one more
#define GRACE_SECONDS   5       // a last bar without successor is over so many seconds after its end
#define LIVE_CATCH_UP   300     // more missed bars than this are sent as history: no signals of hours long gone
#define SETTLE_SECONDS  15      // history that comes short counts as whole when it has not grown for so long
#define SETTLE_LIMIT    300     // the same, where the terminal never reports it as synchronized
#define WORK_MS         3000    // a timer event stops sending after this: WebRequest blocks the EA
#define LONGEST_PAUSE   60      // seconds between two attempts, at most
#define MAX_500         10      // answers 500 to one payload after which it is moved aside
#define REFUSED_KEEP    200     // payloads kept in the folder "refused"
#define MAX_SPANS       200     // spans that the gateway asked for and that are not answered yet
#define SPAN_MARGIN     3600    // a past offset may differ from today's by daylight saving
#define SPAN_TRIES      5       // looks into the terminal's history before a span is given up
#define SPAN_MEMORY     600     // seconds for which a span is not answered twice
#define WATCH_SECONDS   30      // between two looks at Market Watch
#define LOG_SECONDS     600     // between two lines about one and the same trouble

const string TF_NAMES[21] =
  {
   "M1", "M2", "M3", "M4", "M5", "M6", "M10", "M12", "M15", "M20", "M30",
   "H1", "H2", "H3", "H4", "H6", "H8", "H12", "D1", "W1", "MN1"
  };
const ENUM_TIMEFRAMES TF_VALUES[21] =
  {
   PERIOD_M1, PERIOD_M2, PERIOD_M3, PERIOD_M4, PERIOD_M5, PERIOD_M6, PERIOD_M10, PERIOD_M12, PERIOD_M15, PERIOD_M20, PERIOD_M30,
   PERIOD_H1, PERIOD_H2, PERIOD_H3, PERIOD_H4, PERIOD_H6, PERIOD_H8, PERIOD_H12, PERIOD_D1, PERIOD_W1, PERIOD_MN1
  };

//--- one symbol in one timeframe
struct SeriesState
  {
   string            symbol;
   string            timeframe;
   ENUM_TIMEFRAMES   period;
   int               digits;
   double            point;
   bool              active;       // listed in the inputs, or in Market Watch now
   datetime          last;         // open time of the newest finished bar that is in a payload; 0: none
   bool              history;      // what is missing now is sent as history
   int               depth;        // bars read while something is missing
   int               shortCount;   // how many bars came when history came short ...
   ulong             shortSince;   // ... since when so many (ms), and ...
   ulong             waitSince;    // ... since when anything is awaited; 0: nothing is
   MqlRates          sent[KEEP];   // newest finished bars as they were sent, oldest first
   int               sentCount;
   MqlRates          forming;      // the forming bar as it was sent
  };

//--- a span that the gateway lacks, in UTC
struct BackfillSpan
  {
   int               series;
   datetime          from;
   datetime          to;
   datetime          next;         // server time from which on bars are still to be sent; 0: nothing was sent yet
   int               tries;
   bool              done;
   ulong             due;          // ms: not before
  };

SeriesState  g_series[];
BackfillSpan g_spans[];
string       g_queue[];            // names of the payloads on disk, oldest first
string       g_periods[];          // timeframes of the inputs
string       g_unsaved;            // a payload that the disk did not take yet
string       g_items;              // candles of the payload in the making, one a line
int          g_count;              // how many
int          g_closed;             // how many of them are finished bars
string       g_url;
string       g_headers;
string       g_source;
string       g_answer;             // body of the last answer
int          g_retryAfter;         // seconds, of the last answer
int          g_error;              // of the last WebRequest
int          g_lock;               // handle of the file that keeps a second EA out of the folder
int          g_next;               // series with which the next look starts
int          g_pause;              // seconds before the next attempt
int          g_attempts;           // answers 500 to the payload in front
ulong        g_notBefore;          // ms: no attempt before
ulong        g_watched;            // ms: last look at Market Watch
ulong        g_logged;             // ms: when the present trouble was printed last
string       g_trouble;            // what is wrong now; empty: nothing
bool         g_alerted;            // the list of allowed URLs was explained
bool         g_full;               // a full queue was reported
bool         g_dirty;              // state.txt is behind
long         g_sequence;           // number of the newest payload
long         g_server;             // TimeTradeServer() of this look
long         g_gmt;                // TimeGMT() of this look

//+------------------------------------------------------------------+
//| Life                                                             |
//+------------------------------------------------------------------+
int OnInit()
  {
   // The terminal keeps global variables when only the chart's symbol, period or account changes: everything starts anew.
   ArrayResize(g_series, 0);
   ArrayResize(g_spans, 0);
   ArrayResize(g_queue, 0);
   ArrayResize(g_periods, 0);
   g_unsaved = "";
   g_items = "";
   g_count = 0;
   g_closed = 0;
   g_source = "";
   g_answer = "";
   g_retryAfter = 0;
   g_error = 0;
   g_lock = INVALID_HANDLE;
   g_next = 0;
   g_pause = 0;
   g_attempts = 0;
   g_notBefore = 0;
   g_watched = 0;
   g_logged = 0;
   g_trouble = "";
   g_alerted = false;
   g_full = false;
   g_dirty = false;
   g_sequence = 0;

   if(MQLInfoInteger(MQL_TESTER) != 0)
     {
      Print("The Strategy Tester has no WebRequest: attach this EA to a live chart. To test on past bars, export them and use `mt5 replay`.");
      return(INIT_FAILED);
     }
   if(StringFind(InpUrl, "http://") != 0 && StringFind(InpUrl, "https://") != 0)
     {
      Print("InpUrl \"", InpUrl, "\" is no address: write it like http://127.0.0.1:8001");
      return(INIT_PARAMETERS_INCORRECT);
     }
   if(InpTimerSeconds < 1 || InpHistoryBars < 0 || InpChunk < 1 || InpChunk > 4000 || InpTimeoutMs < 1000 || InpQueueFiles < 1)
     {
      Print("An input is out of range: InpTimerSeconds and InpQueueFiles from 1, InpHistoryBars from 0, InpChunk 1 to 4000, InpTimeoutMs from 1000.");
      return(INIT_PARAMETERS_INCORRECT);
     }
   if(StringLen(InpFolder) == 0)
     {
      Print("InpFolder is empty: name a folder, such as CandleCollector.");
      return(INIT_PARAMETERS_INCORRECT);
     }
   g_url = InpUrl;
   while(StringLen(g_url) > 0 && StringGetCharacter(g_url, StringLen(g_url) - 1) == '/')
      g_url = StringSubstr(g_url, 0, StringLen(g_url) - 1);
   g_url = g_url + "/ingest";
   g_headers = "Content-Type: application/json\r\n";
   if(StringLen(InpApiKey) > 0)
      g_headers = g_headers + "X-API-Key: " + InpApiKey + "\r\n";
   if(!ReadTimeframes())
      return(INIT_PARAMETERS_INCORRECT);

   FolderCreate(InpFolder);
   FolderCreate(InpFolder + "\\queue");
   FolderCreate(InpFolder + "\\refused");
   // Opened without FILE_SHARE_READ and FILE_SHARE_WRITE, a file belongs to one program at a time.
   g_lock = FileOpen(InpFolder + "\\lock", FILE_WRITE | FILE_BIN);
   if(g_lock == INVALID_HANDLE)
     {
      Print("MQL5\\Files\\", InpFolder, " is in use (error ", GetLastError(), "): this EA runs on another chart already. One chart serves all symbols; otherwise give each its own InpFolder.");
      return(INIT_FAILED);
     }
   LoadQueue();
   if(!EventSetTimer(InpTimerSeconds))
     {
      Print("The timer did not start (error ", GetLastError(), "): remove the EA from the chart and attach it again.");
      return(INIT_FAILED);
     }
   Print("Sends to ", g_url, "; ", ArraySize(g_queue), " payloads wait in MQL5\\Files\\", InpFolder, "\\queue.");
   return(INIT_SUCCEEDED);
  }

void OnDeinit(const int reason)
  {
   EventKillTimer();
   if(g_lock != INVALID_HANDLE)
     {
      SaveState();
      FileClose(g_lock);
      g_lock = INVALID_HANDLE;
     }
   Comment("");
  }

void OnTimer()
  {
   if(StringLen(g_unsaved) > 0)
      SaveUnsaved();
   Pump();
   // Without a connection there is nothing new, and TimeTradeServer() may not know the server's clock yet.
   if(TerminalInfoInteger(TERMINAL_CONNECTED) != 0 && StringLen(g_unsaved) == 0 && FindSource() && ReadClock())
     {
      WatchSymbols();
      Look();
      AnswerSpans();
      Pump();
     }
   if(g_dirty && StringLen(g_unsaved) == 0)
      SaveState();
   Comment("CandleCollector: ", ArraySize(g_series), " series, ", ArraySize(g_queue), " payloads waiting",
           StringLen(g_trouble) > 0 ? "\n" + g_trouble : "");
  }

//+------------------------------------------------------------------+
//| What is collected                                                |
//+------------------------------------------------------------------+
bool ReadTimeframes()
  {
   string parts[];
   int count = StringSplit(InpTimeframes, ',', parts);
   for(int i = 0; i < count; i++)
     {
      string name = parts[i];
      StringTrimLeft(name);
      StringTrimRight(name);
      StringToUpper(name);
      if(StringLen(name) == 0)
         continue;
      if(PeriodIndex(name) < 0)
        {
         Print("InpTimeframes: \"", name, "\" is unknown. Use M1 M2 M3 M4 M5 M6 M10 M12 M15 M20 M30 H1 H2 H3 H4 H6 H8 H12 D1 W1 MN1.");
         return(false);
        }
      int size = ArraySize(g_periods);
      ArrayResize(g_periods, size + 1);
      g_periods[size] = name;
     }
   if(ArraySize(g_periods) == 0)
     {
      Print("InpTimeframes is empty: name at least one, such as M1.");
      return(false);
     }
   return(true);
  }

int PeriodIndex(const string name)
  {
   for(int i = 0; i < 21; i++)
      if(TF_NAMES[i] == name)
         return(i);
   return(-1);
  }

// The terminal's name is known once it has logged in; the places reached belong to that name.
bool FindSource()
  {
   if(StringLen(g_source) > 0)
      return(true);
   string name = InpSource;
   if(StringLen(name) == 0)
      name = AccountInfoString(ACCOUNT_SERVER);
   if(StringLen(name) == 0)
      return(false);
   g_source = name;
   LoadState();
   return(true);
  }

// Candle times are the server's; the gateway makes UTC of them with the difference of these two.
bool ReadClock()
  {
   g_server = (long)TimeTradeServer();
   g_gmt = (long)TimeGMT();
   return(g_server > 0 && g_gmt > 0);
  }

void WatchSymbols()
  {
   ulong now = GetTickCount64();
   if(g_watched > 0 && now - g_watched < (ulong)WATCH_SECONDS * 1000)
      return;
   bool first = (g_watched == 0);
   g_watched = now;
   bool listed = (StringLen(InpSymbols) > 0);
   if(listed && !first)
      return;
   for(int i = 0; i < ArraySize(g_series); i++)
      g_series[i].active = false;
   if(listed)
     {
      string parts[];
      int count = StringSplit(InpSymbols, ',', parts);
      for(int i = 0; i < count; i++)
        {
         string name = parts[i];
         StringTrimLeft(name);
         StringTrimRight(name);
         if(StringLen(name) == 0)
            continue;
         if(!SymbolSelect(name, true))
            Print("InpSymbols: the broker has no symbol \"", name, "\" (error ", GetLastError(), "). Take the name from Market Watch, with its suffix.");
         else
            AddSymbol(name);
        }
      return;
     }
   int total = SymbolsTotal(true);
   for(int i = 0; i < total; i++)
      AddSymbol(SymbolName(i, true));
  }

void AddSymbol(const string symbol)
  {
   if(StringLen(symbol) == 0)
      return;
   for(int p = 0; p < ArraySize(g_periods); p++)
     {
      int at = FindSeries(symbol, g_periods[p]);
      if(at < 0)
         at = AddSeries(symbol, g_periods[p]);
      g_series[at].digits = (int)SymbolInfoInteger(symbol, SYMBOL_DIGITS);
      g_series[at].point = SymbolInfoDouble(symbol, SYMBOL_POINT);
      g_series[at].active = true;
     }
  }

int FindSeries(const string symbol, const string timeframe)
  {
   for(int i = 0; i < ArraySize(g_series); i++)
      if(g_series[i].symbol == symbol && g_series[i].timeframe == timeframe)
         return(i);
   return(-1);
  }

int AddSeries(const string symbol, const string timeframe)
  {
   int at = ArraySize(g_series);
   ArrayResize(g_series, at + 1, 64);
   g_series[at].symbol = symbol;
   g_series[at].timeframe = timeframe;
   g_series[at].period = TF_VALUES[PeriodIndex(timeframe)];
   g_series[at].digits = 0;
   g_series[at].point = 0;
   g_series[at].active = false;
   g_series[at].last = 0;
   g_series[at].history = false;
   g_series[at].depth = 0;
   g_series[at].shortCount = 0;
   g_series[at].shortSince = 0;
   g_series[at].waitSince = 0;
   g_series[at].sentCount = 0;
   g_series[at].forming.time = 0;
   return(at);
  }

//+------------------------------------------------------------------+
//| Collecting                                                       |
//+------------------------------------------------------------------+
void Look()
  {
   if(ArraySize(g_queue) >= InpQueueFiles)
     {
      if(!g_full)
         Print("The queue is full (", ArraySize(g_queue), " payloads): bars wait in the terminal's own history until the gateway is back. Nothing is lost.");
      g_full = true;
      return;
     }
   g_full = false;
   StartPayload();
   int total = ArraySize(g_series);
   int behind = -1;
   int seen = 0;
   for(seen = 0; seen < total && g_count < InpChunk; seen++)
     {
      int at = (g_next + seen) % total;
      if(g_series[at].active && !ReadNewest(g_series[at]) && behind < 0)
         behind = at;
     }
   if(total > 0)
      g_next = (g_next + seen) % total;
   if(g_closed > 0)
      Enqueue(Payload(false));
   else
      if(g_count > 0)
         SendForming();
   // One chunk at a time and only into an empty queue: live bars of other series never stand behind long history.
   if(behind >= 0 && ArraySize(g_queue) == 0 && StringLen(g_unsaved) == 0)
     {
      CatchUp(g_series[behind]);
      g_next = (behind + 1) % total;
     }
  }

// Adds what is new at the end of a series to the payload; false where bars before that are missing.
bool ReadNewest(SeriesState &s)
  {
   if(s.last == 0 || s.history)
      return(false);
   MqlRates rates[];
   ArraySetAsSeries(rates, false);
   int got = CopyRates(s.symbol, s.period, 0, TAIL, rates);   // oldest first; the last one is the newest, maybe forming
   if(got <= 0)
      return(true);                                           // nothing ready yet: the next look asks again
   if(rates[0].time > s.last)
      return(false);
   for(int i = 0; i < got; i++)
     {
      bool finished = (i < got - 1 || IsOver(rates[i], s.period));
      if(rates[i].time > s.last)
        {
         if(finished)
           {
            AddCandle(s, rates[i], true);
            Remember(s, rates[i]);
           }
         else
            if(InpSendForming && !Same(rates[i], s.forming))
              {
               AddCandle(s, rates[i], false);
               s.forming = rates[i];
              }
        }
      else
         if(finished && WasChanged(s, rates[i]))
            AddCandle(s, rates[i], true);
     }
   return(true);
  }

// Sends the oldest bars that are missing, one chunk; what comes short while the terminal downloads is asked for again.
void CatchUp(SeriesState &s)
  {
   int most = (int)TerminalInfoInteger(TERMINAL_MAXBARS);
   if(most < TAIL)
      most = 1000000;
   if(s.depth == 0)
      s.depth = (s.last == 0 ? (int)MathMax(InpHistoryBars, 1) + 1 : 4 * TAIL);
   int wanted = (int)MathMin(s.depth, most);
   MqlRates rates[];
   ArraySetAsSeries(rates, false);
   int got = CopyRates(s.symbol, s.period, 0, wanted, rates);
   bool bridged = (got > 0 && s.last > 0 && rates[0].time <= s.last);
   if(!bridged && s.last > 0 && got >= wanted && wanted < most)
     {
      s.depth = (int)MathMin(2 * wanted, most);   // the EA was away for longer: look further back
      return;
     }
   if(!bridged && got < wanted && !HasSettled(s, got))
      return;
   int start = 0;
   while(start < got && rates[start].time <= s.last)
      start++;
   int finished = got;
   if(finished > 0 && !IsOver(rates[finished - 1], s.period))
      finished--;
   if(s.last == 0 && InpHistoryBars == 0)
      start = (int)MathMax(finished - 1, 0);      // no history is wanted: the newest finished bar is where live begins
   if(s.last == 0 || finished - start > LIVE_CATCH_UP)
      s.history = true;
   StartPayload();
   int stop = (int)MathMin(finished, start + InpChunk);
   for(int i = start; i < stop; i++)
     {
      AddCandle(s, rates[i], true);
      Remember(s, rates[i]);
     }
   bool asHistory = s.history;
   if(stop >= finished && s.last > 0)
     {
      if(s.history)
         Print(s.symbol, " ", s.timeframe, ": history is on its way, live from here.");
      s.history = false;
      s.depth = 0;
     }
   if(g_count > 0)
     {
      s.waitSince = 0;
      Enqueue(Payload(asHistory));
     }
  }

// Whether history that comes short is all there is: it stopped growing and the terminal says that it is in step.
bool HasSettled(SeriesState &s, const int got)
  {
   ulong now = GetTickCount64();
   if(s.waitSince == 0)
     {
      s.waitSince = now;
      s.shortSince = now;
      s.shortCount = got;
      Print(s.symbol, " ", s.timeframe, ": the terminal has ", (int)MathMax(got, 0), " bars so far; waiting for its download.");
      return(false);
     }
   if(got != s.shortCount)
     {
      s.shortCount = got;
      s.shortSince = now;
      return(false);
     }
   if(got <= 0)
      return(false);
   if(SeriesInfoInteger(s.symbol, s.period, SERIES_SYNCHRONIZED) != 0 && now - s.shortSince >= (ulong)SETTLE_SECONDS * 1000)
      return(true);
   if(now - s.shortSince < (ulong)SETTLE_LIMIT * 1000)
      return(false);
   Print(s.symbol, " ", s.timeframe, ": the terminal's history stays at ", got, " bars and is not synchronized; going on with them.");
   return(true);
  }

// A bar without successor is over by the server's clock, a little late, so that ticks on their way still enter it.
bool IsOver(const MqlRates &bar, const ENUM_TIMEFRAMES period)
  {
   return(g_server >= BarEnd((long)bar.time, period) + GRACE_SECONDS);
  }

long BarEnd(const long opened, const ENUM_TIMEFRAMES period)
  {
   if(period != PERIOD_MN1)
      return(opened + PeriodSeconds(period));
   MqlDateTime parts;
   TimeToStruct((datetime)opened, parts);
   parts.mon++;
   if(parts.mon > 12)
     {
      parts.mon = 1;
      parts.year++;
     }
   return((long)StructToTime(parts));
  }

bool Same(const MqlRates &a, const MqlRates &b)
  {
   return(a.time == b.time && a.open == b.open && a.high == b.high && a.low == b.low && a.close == b.close
          && a.tick_volume == b.tick_volume && a.spread == b.spread && a.real_volume == b.real_volume);
  }

// Takes a finished bar as sent; the newest KEEP are compared at each look, since a terminal that reconnects mends its bars.
void Remember(SeriesState &s, const MqlRates &bar)
  {
   if(s.sentCount == KEEP)
     {
      for(int i = 1; i < KEEP; i++)
         s.sent[i - 1] = s.sent[i];
      s.sentCount--;
     }
   s.sent[s.sentCount] = bar;
   s.sentCount++;
   s.last = bar.time;
   g_dirty = true;
  }

bool WasChanged(SeriesState &s, const MqlRates &bar)
  {
   for(int i = s.sentCount - 1; i >= 0; i--)
      if(s.sent[i].time == bar.time)
        {
         if(Same(s.sent[i], bar))
            return(false);
         s.sent[i] = bar;
         return(true);
        }
   return(false);
  }

//+------------------------------------------------------------------+
//| Payloads                                                         |
//+------------------------------------------------------------------+
void StartPayload()
  {
   g_items = "";
   g_count = 0;
   g_closed = 0;
  }

void AddCandle(const SeriesState &s, const MqlRates &bar, const bool closed)
  {
   if(g_count > 0)
      StringAdd(g_items, ",\n");
   string line = "{\"symbol\":" + Json(s.symbol) + ",\"timeframe\":\"" + s.timeframe + "\"";
   line = line + ",\"time\":" + IntegerToString((long)bar.time);
   line = line + ",\"open\":" + DoubleToString(bar.open, s.digits) + ",\"high\":" + DoubleToString(bar.high, s.digits);
   line = line + ",\"low\":" + DoubleToString(bar.low, s.digits) + ",\"close\":" + DoubleToString(bar.close, s.digits);
   line = line + ",\"tick_volume\":" + IntegerToString(bar.tick_volume) + ",\"spread\":" + IntegerToString(bar.spread);
   line = line + ",\"real_volume\":" + IntegerToString(bar.real_volume);
   if(s.point > 0)
      line = line + ",\"point\":" + DoubleToString(s.point, s.digits);
   line = line + (closed ? ",\"closed\":true}" : ",\"closed\":false}");
   StringAdd(g_items, line);
   g_count++;
   if(closed)
      g_closed++;
  }

string Payload(const bool history)
  {
   string text = "{\"source\":" + Json(g_source) + ",\"server_time\":" + IntegerToString(g_server) + ",\"gmt_time\":" + IntegerToString(g_gmt);
   if(history)
      text = text + ",\"history\":true";
   StringAdd(text, ",\"items\":[\n");
   StringAdd(text, g_items);
   StringAdd(text, "\n]}");
   return(text);
  }

// A JSON string in ASCII: brokers' names may hold quotes, backslashes and letters of any script.
string Json(const string text)
  {
   string out = "\"";
   int length = StringLen(text);
   for(int i = 0; i < length; i++)
     {
      ushort c = StringGetCharacter(text, i);
      if(c == '"' || c == '\\')
         out = out + "\\" + ShortToString(c);
      else
         if(c < 32 || c > 126)
            out = out + StringFormat("\\u%04x", (int)c);
         else
            out = out + ShortToString(c);
     }
   return(out + "\"");
  }

// Forming bars are worth nothing a second later: sent once, never queued, and not at all while the gateway is in trouble.
void SendForming()
  {
   if(ArraySize(g_queue) > 0 || StringLen(g_unsaved) > 0 || GetTickCount64() < g_notBefore)
      return;
   char body[];
   ToBytes(Payload(false), body);
   int status = Post(body);
   if(status == 200)
      Succeeded();
   else
      if(status != 422)
         Postpone(status);
  }

//+------------------------------------------------------------------+
//| The queue on disk                                                |
//+------------------------------------------------------------------+
string QueuePath(const string name)
  {
   return(InpFolder + "\\queue\\" + name);
  }

void LoadQueue()
  {
   ListFiles(InpFolder + "\\queue\\*.json", g_queue);
   string refused[];
   ListFiles(InpFolder + "\\refused\\*.json", refused);
   // Names are numbers that only grow, also when both folders were emptied by hand.
   g_sequence = (long)TimeLocal();
   if(ArraySize(g_queue) > 0)
      g_sequence = (long)MathMax(g_sequence, StringToInteger(StringSubstr(g_queue[ArraySize(g_queue) - 1], 0, 10)));
   if(ArraySize(refused) > 0)
      g_sequence = (long)MathMax(g_sequence, StringToInteger(StringSubstr(refused[ArraySize(refused) - 1], 0, 10)));
  }

void ListFiles(const string filter, string &names[])
  {
   ArrayResize(names, 0);
   string name = "";
   long search = FileFindFirst(filter, name);
   if(search == INVALID_HANDLE)
      return;
   do
     {
      int at = ArraySize(names);
      ArrayResize(names, at + 1, 256);
      while(at > 0 && StringCompare(names[at - 1], name) > 0)
        {
         names[at] = names[at - 1];
         at--;
        }
      names[at] = name;
     }
   while(FileFindNext(search, name));
   FileFindClose(search);
  }

void Enqueue(const string text)
  {
   g_unsaved = text;
   SaveUnsaved();
  }

// Until the disk takes the payload nothing else is collected.
void SaveUnsaved()
  {
   string name = IntegerToString(g_sequence + 1, 10, '0') + ".json";
   char body[];
   ToBytes(g_unsaved, body);
   if(!WriteBytes(QueuePath(name), body))
     {
      Trouble("A payload cannot be written to MQL5\\Files\\" + InpFolder + "\\queue (error " + IntegerToString(GetLastError()) + "): free disk space.");
      return;
     }
   g_sequence++;
   g_unsaved = "";
   int size = ArraySize(g_queue);
   ArrayResize(g_queue, size + 1, 256);
   g_queue[size] = name;
  }

// Written under another name first: a file of the queue is always whole.
bool WriteBytes(const string path, const char &body[])
  {
   int handle = FileOpen(path + ".tmp", FILE_WRITE | FILE_BIN);
   if(handle == INVALID_HANDLE)
      return(false);
   int size = ArraySize(body);
   uint written = FileWriteArray(handle, body, 0, size);
   FileFlush(handle);
   FileClose(handle);
   if((int)written != size)
      return(false);
   return(FileMove(path + ".tmp", 0, path, FILE_REWRITE));
  }

bool ReadBytes(const string path, char &body[])
  {
   ArrayResize(body, 0);
   int handle = FileOpen(path, FILE_READ | FILE_BIN);
   if(handle == INVALID_HANDLE)
      return(false);
   ArrayResize(body, (int)FileSize(handle));
   uint read = FileReadArray(handle, body, 0, ArraySize(body));
   FileClose(handle);
   return((int)read == ArraySize(body) && ArraySize(body) > 0);
  }

void RemoveFront()
  {
   int size = ArraySize(g_queue);
   for(int i = 1; i < size; i++)
      g_queue[i - 1] = g_queue[i];
   ArrayResize(g_queue, size - 1, 256);
   g_attempts = 0;
  }

// Sends the queue in order, for a bounded time.
void Pump()
  {
   ulong started = GetTickCount64();
   while(ArraySize(g_queue) > 0 && !IsStopped() && GetTickCount64() >= g_notBefore && GetTickCount64() - started < WORK_MS)
     {
      string name = g_queue[0];
      char body[];
      if(!ReadBytes(QueuePath(name), body))
        {
         Print("Payload ", name, " of the queue cannot be read (error ", GetLastError(), "): it is skipped.");
         RemoveFront();
         continue;
        }
      int status = Post(body);
      if(status == 200)
        {
         Succeeded();
         if(StringFind(g_answer, "\"rejected\":[]") < 0)
            Print("The gateway took ", name, " but for these candles: ", StringSubstr(g_answer, 0, 1000));
         FileDelete(QueuePath(name));
         RemoveFront();
         ReadBackfill(g_answer);
         continue;
        }
      if(status == 413)
        {
         if(!SplitFront(body))
            Refuse(status);
         continue;
        }
      if(status == 500)
         g_attempts++;
      bool judged = (StringFind(g_answer, "\"error\"") >= 0 || StringFind(g_answer, "\"rejected\"") >= 0);   // by the gateway, not by a proxy
      if(judged && (status == 400 || status == 415 || status == 422 || (status == 500 && g_attempts >= MAX_500)))
        {
         Refuse(status);
         continue;
        }
      Postpone(status);
      return;
     }
  }

// Cuts the payload in front in two halves, which take its place in the queue.
bool SplitFront(const char &body[])
  {
   string text = CharArrayToString(body, 0, ArraySize(body), CP_UTF8);
   string lines[];
   int count = StringSplit(text, '\n', lines);     // head, candles, tail
   int candles = count - 2;
   if(candles < 2)
      return(false);
   string stem = StringSubstr(g_queue[0], 0, StringLen(g_queue[0]) - 5);
   int half = candles / 2;
   string first = lines[0] + "\n";
   string second = first;
   for(int i = 1; i <= candles; i++)
     {
      string line = lines[i];
      if(StringSubstr(line, StringLen(line) - 1, 1) == ",")
         line = StringSubstr(line, 0, StringLen(line) - 1);
      if(i <= half)
         StringAdd(first, line + (i < half ? ",\n" : "\n]}"));
      else
         StringAdd(second, line + (i < candles ? ",\n" : "\n]}"));
     }
   char firstBytes[];
   char secondBytes[];
   ToBytes(first, firstBytes);
   ToBytes(second, secondBytes);
   if(!WriteBytes(QueuePath(stem + "a.json"), firstBytes) || !WriteBytes(QueuePath(stem + "b.json"), secondBytes))
     {
      Trouble("A payload cannot be cut in two (error " + IntegerToString(GetLastError()) + "): free disk space.");
      Pause(0);
      return(true);
     }
   FileDelete(QueuePath(g_queue[0]));
   int size = ArraySize(g_queue);
   ArrayResize(g_queue, size + 1, 256);
   for(int i = size; i > 1; i--)
      g_queue[i] = g_queue[i - 1];
   g_queue[0] = stem + "a.json";
   g_queue[1] = stem + "b.json";
   g_attempts = 0;
   Print("The gateway found a payload of ", candles, " candles too large: it goes in two. A smaller InpChunk avoids this.");
   return(true);
  }

// Moves the payload in front aside, with the gateway's answer beside it.
void Refuse(const int status)
  {
   string name = g_queue[0];
   string kept = InpFolder + "\\refused\\" + name;
   Print("The gateway refused ", name, " (", status, "): ", StringSubstr(g_answer, 0, 1000), " It is kept in MQL5\\Files\\", kept);
   if(!FileMove(QueuePath(name), 0, kept, FILE_REWRITE))
      Print("It cannot be moved there (error ", GetLastError(), ") and stays in the queue's folder until the next start.");
   int handle = FileOpen(kept + ".answer.txt", FILE_WRITE | FILE_TXT | FILE_UNICODE);
   if(handle != INVALID_HANDLE)
     {
      FileWriteString(handle, IntegerToString(status) + " " + g_answer + "\r\n");
      FileClose(handle);
     }
   RemoveFront();
   g_pause = 0;
   string names[];
   ListFiles(InpFolder + "\\refused\\*.json", names);
   for(int i = 0; i < ArraySize(names) - REFUSED_KEEP; i++)
     {
      Print("More than ", REFUSED_KEEP, " refused payloads are kept: ", names[i], " is deleted.");
      FileDelete(InpFolder + "\\refused\\" + names[i]);
      FileDelete(InpFolder + "\\refused\\" + names[i] + ".answer.txt");
     }
  }

//+------------------------------------------------------------------+
//| The gateway                                                      |
//+------------------------------------------------------------------+
// The text as bytes without the NUL that StringToCharArray appends.
void ToBytes(const string text, char &bytes[])
  {
   int size = StringToCharArray(text, bytes, 0, WHOLE_ARRAY, CP_UTF8);
   while(size > 0 && bytes[size - 1] == 0)
      size--;
   ArrayResize(bytes, size);
  }

// The HTTP status, or -1; fills g_answer, g_retryAfter and g_error.
int Post(const char &body[])
  {
   char result[];
   string headers = "";
   ResetLastError();
   int status = WebRequest("POST", g_url, g_headers, InpTimeoutMs, body, result, headers);
   g_error = (status == -1 ? GetLastError() : 0);
   g_answer = (ArraySize(result) > 0 ? CharArrayToString(result, 0, ArraySize(result), CP_UTF8) : "");
   g_retryAfter = RetryAfter(headers);
   if(status == 200 && StringFind(g_answer, "\"accepted\"") < 0)
      return(404);                                   // a proxy's page says 200 too
   return(status);
  }

int RetryAfter(const string headers)
  {
   string lower = headers;
   StringToLower(lower);
   int at = StringFind(lower, "retry-after:");
   if(at < 0)
      return(0);
   string value = StringSubstr(lower, at + 12, 12);
   int end = StringFind(value, "\r");
   if(end >= 0)
      value = StringSubstr(value, 0, end);
   StringTrimLeft(value);
   StringTrimRight(value);
   return((int)MathMin(MathMax(StringToInteger(value), 0), 3600));   // a date instead of seconds gives 0
  }

void Succeeded()
  {
   if(StringLen(g_trouble) > 0)
      Print("The gateway takes candles again.");
   g_trouble = "";
   g_pause = 0;
   g_notBefore = 0;
   g_alerted = false;
  }

// The same bytes are sent again later; says why, once.
void Postpone(const int status)
  {
   if(status == -1 && (g_error == 4014 || g_error == 4060 || g_error == 5200))
     {
      string text = "WebRequest may not reach " + g_url + " (error " + IntegerToString(g_error)
                    + "): open Tools > Options > Expert Advisors, tick \"Allow WebRequest for listed URL\", add " + InpUrl + " and press OK.";
      if(!g_alerted)
         Alert(text);
      g_alerted = true;
      Trouble(text);
     }
   else
      if(status == 401 || status == 403)
         Trouble("The gateway refuses this EA (" + IntegerToString(status) + "): set InpApiKey to one of its MT5_API_KEYS. It says: " + StringSubstr(g_answer, 0, 300));
      else
         if(status == 404 || status == 405 || (status >= 300 && status < 400))
            Trouble("What answers at " + g_url + " is no gateway (" + IntegerToString(status) + "): correct InpUrl.");
         else
            if(status == -1)
               Trouble("No gateway answers at " + g_url + " (error " + IntegerToString(g_error) + "): is it running? Candles wait on disk.");
            else
               Trouble("The gateway answers " + IntegerToString(status) + ": the same payload is sent again. " + StringSubstr(g_answer, 0, 300));
   Pause(g_retryAfter);
  }

void Pause(const int atLeast)
  {
   g_pause = (int)MathMin(MathMax(2 * g_pause, 1), LONGEST_PAUSE);
   g_notBefore = GetTickCount64() + (ulong)MathMax(g_pause, atLeast) * 1000;
  }

void Trouble(const string text)
  {
   ulong now = GetTickCount64();
   if(text == g_trouble && now - g_logged < (ulong)LOG_SECONDS * 1000)
      return;
   g_trouble = text;
   g_logged = now;
   Print(text);
  }

//+------------------------------------------------------------------+
//| Backfill: spans that the gateway lacks                           |
//+------------------------------------------------------------------+
// Reads "backfill":[{"symbol":...,"timeframe":...,"from":...,"to":...}] of an answer.
void ReadBackfill(const string answer)
  {
   int pos = StringFind(answer, "\"backfill\":[");
   if(pos < 0)
      return;
   pos += 12;
   int length = StringLen(answer);
   while(pos < length)
     {
      ushort c = StringGetCharacter(answer, pos);
      if(c == ' ' || c == ',' || c == '\n')
        {
         pos++;
         continue;
        }
      if(c != '{')
         return;
      pos++;
      string symbol = "";
      string timeframe = "";
      string from = "";
      string to = "";
      while(pos < length && StringGetCharacter(answer, pos) != '}')
        {
         if(StringGetCharacter(answer, pos) != '"')
           {
            pos++;
            continue;
           }
         string key = "";
         string value = "";
         if(!ReadString(answer, pos, key))
            return;
         while(pos < length && StringGetCharacter(answer, pos) != '"')
            pos++;
         if(!ReadString(answer, pos, value))
            return;
         if(key == "symbol")
            symbol = value;
         if(key == "timeframe")
            timeframe = value;
         if(key == "from")
            from = value;
         if(key == "to")
            to = value;
        }
      pos++;
      AskFor(symbol, timeframe, Moment(from), Moment(to));
     }
  }

// A JSON string at pos, which is then behind it.
bool ReadString(const string text, int &pos, string &value)
  {
   int length = StringLen(text);
   value = "";
   pos++;
   while(pos < length)
     {
      ushort c = StringGetCharacter(text, pos);
      pos++;
      if(c == '"')
         return(true);
      if(c == '\\')
        {
         c = StringGetCharacter(text, pos);
         pos++;
         if(c == 'u')
           {
            c = (ushort)Hex(StringSubstr(text, pos, 4));
            pos += 4;
           }
         else
            if(c == 'n')
               c = '\n';
            else
               if(c == 't')
                  c = '\t';
        }
      StringAdd(value, ShortToString(c));
     }
   return(false);
  }

int Hex(const string digits)
  {
   int value = 0;
   for(int i = 0; i < StringLen(digits); i++)
     {
      int at = StringFind("0123456789abcdef", StringSubstr(digits, i, 1));
      if(at < 0)
         at = StringFind("0123456789ABCDEF", StringSubstr(digits, i, 1));
      value = 16 * value + (int)MathMax(at, 0);
     }
   return(value);
  }

// 2025-02-13T01:33:00Z, always UTC; 0 where it is no time.
datetime Moment(const string text)
  {
   if(StringLen(text) < 19)
      return(0);
   MqlDateTime parts;
   parts.year = (int)StringToInteger(StringSubstr(text, 0, 4));
   parts.mon = (int)StringToInteger(StringSubstr(text, 5, 2));
   parts.day = (int)StringToInteger(StringSubstr(text, 8, 2));
   parts.hour = (int)StringToInteger(StringSubstr(text, 11, 2));
   parts.min = (int)StringToInteger(StringSubstr(text, 14, 2));
   parts.sec = (int)StringToInteger(StringSubstr(text, 17, 2));
   parts.day_of_week = 0;
   parts.day_of_year = 0;
   if(parts.year < 1970 || parts.mon < 1 || parts.mon > 12 || parts.day < 1 || parts.day > 31)
      return(0);
   return(StructToTime(parts));
  }

void AskFor(const string symbol, const string timeframe, const datetime from, const datetime to)
  {
   int at = FindSeries(symbol, timeframe);
   if(at < 0 || from == 0 || to < from)
      return;                                        // no series of this EA
   ulong now = GetTickCount64();
   int size = ArraySize(g_spans);
   for(int i = size - 1; i >= 0; i--)
     {
      if(g_spans[i].done && now >= g_spans[i].due)
        {
         for(int k = i + 1; k < size; k++)
            g_spans[k - 1] = g_spans[k];
         size--;
         ArrayResize(g_spans, size);
         continue;
        }
      if(g_spans[i].series == at && g_spans[i].from <= from && g_spans[i].to >= to)
         return;                                     // answered a moment ago, or waiting
     }
   if(size >= MAX_SPANS)
      return;                                        // the gateway asks again
   ArrayResize(g_spans, size + 1, 16);
   g_spans[size].series = at;
   g_spans[size].from = from;
   g_spans[size].to = to;
   g_spans[size].next = 0;
   g_spans[size].tries = 0;
   g_spans[size].done = false;
   g_spans[size].due = now;
   Print("The gateway lacks ", symbol, " ", timeframe, " from ", TimeToString(from), " to ", TimeToString(to), " UTC.");
  }

// One chunk a look, into an empty queue. Where the terminal has nothing, nothing is sent: the gateway stops asking.
void AnswerSpans()
  {
   if(ArraySize(g_queue) > 0 || StringLen(g_unsaved) > 0)
      return;
   ulong now = GetTickCount64();
   for(int i = 0; i < ArraySize(g_spans); i++)
      if(!g_spans[i].done && now >= g_spans[i].due)
        {
         AnswerSpan(g_spans[i], g_series[g_spans[i].series], now);
         return;
        }
  }

void AnswerSpan(BackfillSpan &span, SeriesState &s, const ulong now)
  {
   // The offset of the span's own time may be another one than today's: one hour more on both sides; repeats have no effect.
   long offset = (long)MathRound((double)(g_server - g_gmt) / 900.0) * 900;
   datetime from = (span.next > 0 ? span.next : (datetime)((long)span.from + offset - SPAN_MARGIN));
   datetime to = (datetime)((long)span.to + offset + SPAN_MARGIN);
   if(to > s.last)
      to = s.last;                                   // what is newer is sent as it closes
   MqlRates rates[];
   ArraySetAsSeries(rates, false);
   int got = (to >= from ? CopyRates(s.symbol, s.period, from, to, rates) : 0);
   if(got <= 0 && span.next == 0 && span.tries + 1 < SPAN_TRIES)
     {
      span.tries++;                                  // the terminal may be downloading
      span.due = now + (ulong)span.tries * 5000;
      return;
     }
   if(got <= 0 && span.next == 0)
      Print("The terminal has no bars of ", s.symbol, " ", s.timeframe, " from ", TimeToString(span.from), " to ", TimeToString(span.to), " UTC either.");
   StartPayload();
   int stop = (int)MathMin(got, InpChunk);
   for(int i = 0; i < stop; i++)
      AddCandle(s, rates[i], true);
   if(g_count > 0)
      Enqueue(Payload(false));
   if(got > stop && stop > 0)
     {
      span.next = (datetime)((long)rates[stop - 1].time + 1);
      return;
     }
   span.done = true;
   span.due = now + (ulong)SPAN_MEMORY * 1000;
  }

//+------------------------------------------------------------------+
//| The places reached                                               |
//+------------------------------------------------------------------+
// Saved after the payload is on disk: what is lost in between is sent twice, which has no effect.
void SaveState()
  {
   if(!g_dirty || StringLen(g_source) == 0 || StringLen(g_unsaved) > 0)
      return;
   string path = InpFolder + "\\state.txt";
   int handle = FileOpen(path + ".tmp", FILE_WRITE | FILE_TXT | FILE_UNICODE);
   if(handle == INVALID_HANDLE)
      return;
   FileWriteString(handle, g_source + "\r\n");
   for(int i = 0; i < ArraySize(g_series); i++)
      if(g_series[i].last > 0)
         FileWriteString(handle, g_series[i].symbol + "\t" + g_series[i].timeframe + "\t" + IntegerToString((long)g_series[i].last) + "\t"
                         + (g_series[i].history ? "1" : "0") + "\r\n");
   FileFlush(handle);
   FileClose(handle);
   if(FileMove(path + ".tmp", 0, path, FILE_REWRITE))
      g_dirty = false;
  }

void LoadState()
  {
   string path = InpFolder + "\\state.txt";
   if(!FileIsExist(path))
      return;
   int handle = FileOpen(path, FILE_READ | FILE_TXT | FILE_UNICODE);
   if(handle == INVALID_HANDLE)
      return;
   if(FileReadString(handle) == g_source)            // another broker's places mean nothing here
      while(!FileIsEnding(handle))
        {
         string parts[];
         if(StringSplit(FileReadString(handle), '\t', parts) != 4 || PeriodIndex(parts[1]) < 0)
            continue;
         int at = AddSeries(parts[0], parts[1]);
         g_series[at].last = (datetime)StringToInteger(parts[2]);
         g_series[at].history = (StringSubstr(parts[3], 0, 1) == "1");
        }
   FileClose(handle);
  }
//+------------------------------------------------------------------+
